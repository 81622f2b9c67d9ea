"""Builders of the system ``krona``: the form on linear layers, our methods on the feed-forward sub-layer of T5."""

from __future__ import annotations

from torch import Tensor, nn

import torchgraft as tg
from torchgraft.core.placements import Placement, WeightDelta
from torchgraft.methods.forms.kronecker import Kronecker
from torchgraft.methods.krona import KronAB, KronABRes

from ..case import Config, GoldenCase, StateError, Tensors
from ..files import CaseError
from ._linears import LayerNames, Linears, LinearsNetwork, OnLinears


def linear(config: Config, mode: str) -> GoldenCase:
    """One product per layer, each with a split of its own."""
    shapes = config["factor_shapes"]
    host = Linears([(a1 * b1, a2 * b2) for a1, a2, b1, b2 in shapes])

    def place(anatomy: tg.Anatomy) -> list[Placement]:
        placed: list[Placement] = []
        for j, (a1, a2, _, _) in enumerate(shapes):
            layer: nn.Linear = anatomy.module(f"layer{j}")  # type: ignore[assignment]
            form = Kronecker(layer.weight.shape, (a1, a2), config["scale"])
            placed.append(WeightDelta.on(layer, f"layer{j}", form, called=True))
        return placed

    names = LayerNames(host, own={"A": "a", "B": "b"}, shared={})
    return LinearsNetwork(host, names, num_classes=None, mode=mode, method=OnLinears(place))


def t5_ffn(config: Config, mode: str) -> GoldenCase:
    a1, a2, b1, b2 = config["factor_shape"]
    if a1 * b1 != config["d_model"] or a2 * b2 != config["d_model"]:
        raise CaseError(f"t5_ffn: factor_shape {[a1, a2, b1, b2]} does not fit d_model {config['d_model']}")
    side = config["adapter_input"]
    if side not in ("post_norm", "pre_norm"):
        raise CaseError(f"t5_ffn: unknown adapter_input {side!r}, expected 'post_norm' or 'pre_norm'")
    options = {"a_shape": (a1, a2), "scale": config["scale"], "adapter_input": side}
    return T5Case(T5FeedForward(config), KronAB(**options), KronABRes(**options))


FORMS = {"linear": linear, "t5_ffn": t5_ffn}


class Mlp(nn.Module):
    """T5's two layers, or three where the first is gated."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        if config["ffn"] not in ("relu", "gated_gelu_tanh"):
            raise CaseError(f"t5_ffn: unknown ffn {config['ffn']!r}, expected 'relu' or 'gated_gelu_tanh'")
        self.gated = config["ffn"] == "gated_gelu_tanh"
        for name in ("wi_0", "wi_1") if self.gated else ("wi",):
            self.add_module(name, nn.Linear(config["d_model"], config["d_ff"], bias=False))
        self.wo = nn.Linear(config["d_ff"], config["d_model"], bias=False)

    def forward(self, x: Tensor) -> Tensor:
        if self.gated:
            return self.wo(nn.functional.gelu(self.wi_0(x), approximate="tanh") * self.wi_1(x))
        return self.wo(self.wi(x).relu())


class FeedForwardBlock(nn.Module):
    """``x + MLP(norm(x))``, the norm without a mean."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.layer_norm = nn.RMSNorm(config["d_model"], eps=config["norm_eps"])
        self.mlp = Mlp(config)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mlp(self.layer_norm(x))


class T5FeedForward(nn.Module):
    """One feed-forward sub-layer between layers that change nothing: the first and last layer are in no block."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        d = config["d_model"]
        self.first, self.last = nn.Linear(d, d, bias=False), nn.Linear(d, d, bias=False)
        nn.init.eye_(self.first.weight)
        nn.init.eye_(self.last.weight)
        self.blocks = nn.ModuleList([FeedForwardBlock(config)])

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.blocks[0](self.first(x)))


class T5Case(GoldenCase):
    """The plain sub-layer, and both methods on it as two adapters that own the same A and B."""

    def __init__(self, host: nn.Module, plain: tg.Method, residual: tg.Method) -> None:
        self._model = host.eval()
        self._host = {k: t for k, t in host.state_dict(keep_vars=True).items() if k.startswith("blocks.")}
        forms = []
        for name, method in (("krona_b", plain), ("krona_b_res", residual)):
            adapter = tg.attach(host, method, name=name, lean=False)
            forms += [placement.form for _, placement in adapter.placements]
        assert len(forms) == 2
        forms[0].a, forms[0].b = forms[1].a, forms[1].b
        self._form = forms[1]

    def name_of(self, key: str) -> str | None:
        owner, _, name = key.rpartition(".")
        ours = f"krona.{name.lower()}" if owner == "krona" else f"blocks.0.mlp.{key}"
        if owner == "layer_norm":
            ours = f"blocks.0.{key}"
        if ours not in self.state():
            raise StateError(f"official key {key!r} has no place: we have no tensor {ours!r}")
        return ours

    def state(self) -> Tensors:
        return {**self._host, **{f"krona.{n}": p for n, p in self._form.named_parameters()}}

    def parameters(self) -> dict[str, nn.Parameter]:
        return {n: t for n, t in self.state().items() if isinstance(t, nn.Parameter)}

    def adapter_parameters(self) -> set[str]:
        return {name for name in self.state() if name.startswith("krona.")}

    def frozen(self) -> Tensors:
        return self._host

    def train(self, mode: bool) -> None:
        self._model.train(mode)

    def run(self, inputs: Tensors) -> Tensors:
        outputs = {}
        for output, adapter in (("ffn", None), ("krona_b", "krona_b"), ("krona_b_res", "krona_b_res")):
            tg.activate(self._model, adapter)
            outputs[output] = self._model(inputs["x"])
        return outputs

    def loss(self, outputs: Tensors) -> Tensor:
        return outputs["krona_b"].square().mean() + outputs["krona_b_res"].square().mean()
