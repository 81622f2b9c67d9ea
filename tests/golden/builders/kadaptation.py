"""Builders of the system ``kadaptation``: the paper's form on linear layers, and the released code's behaviour.

The released code is reproduced here and not in the library: its increment mixes the tokens, heads and images of a
batch, which is no change of weights that anybody should train.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

import torchgraft as tg
from torchgraft.core.layers import make_activation
from torchgraft.core.placements import Placement, WeightDelta
from torchgraft.methods.kadaptation import KroneckerSum, Shift, slow_matrices

from ..case import Config, GoldenCase, StateError, Tensors
from ..files import CaseError
from ._linears import LayerNames, Linears, LinearsNetwork, OnLinears


def linear(config: Config, mode: str) -> GoldenCase:
    """One sum of products per layer; all layers share the slow matrices."""
    shapes = config["shapes_in_out"]
    host = Linears(shapes)
    slow = slow_matrices(config["n"], config["slow_rank"])

    def place(anatomy: tg.Anatomy) -> list[Placement]:
        placed: list[Placement] = []
        for j in range(len(shapes)):
            path = f"layer{j}"
            layer: nn.Linear = anatomy.module(path)  # type: ignore[assignment]
            form = KroneckerSum(tuple(layer.weight.shape), slow, config["rank"], config["scale"])
            placed.append(WeightDelta.on(layer, path, form, called=True))
            if config["delta_bias"]:
                placed.append(WeightDelta(path, Shift(layer.out_features), parameter="bias", slot="bias"))
        return placed

    own = {name: name for name in ("u", "v", "delta_bias")}
    shared = {"A": "slow", "A_left": "slow_left", "A_right": "slow_right"}
    names = LayerNames(host, own, shared)
    return LinearsNetwork(host, names, num_classes=None, mode=mode, method=OnLinears(place))


def pevit_vit(config: Config, mode: str) -> GoldenCase:
    if config["act"] != "quick_gelu":
        raise CaseError(f"pevit_vit: unknown act {config['act']!r}, expected 'quick_gelu'")
    if config["width"] % config["n"] or config["width"] % config["heads"]:
        raise CaseError(f"pevit_vit: n {config['n']} and heads {config['heads']} must divide width {config['width']}")
    return PevitCase(PevitVit(config), config["layers"])


FORMS = {"linear": linear, "pevit_vit": pevit_vit}


class PevitAttention(nn.Module):
    """Attention over (tokens, batch, d) with the increments of q and v as released.

    Both increments come from the query's fast factors, q's is added behind the scaling by 1/sqrt(head size), and both
    are reshaped from (tokens, batch, d) to (batch * heads, tokens, head size) without a transposition.
    """

    def __init__(self, config: Config, slow: list[tuple[nn.Parameter, ...]]) -> None:
        super().__init__()
        d, self.heads = config["width"], config["heads"]
        self.in_proj = nn.Linear(d, 3 * d)
        self.out_proj = nn.Linear(d, d)
        self.q_form, self.v_form = (KroneckerSum((d, d), s, config["rank"], config["scale"]) for s in slow)
        self.v_form.u, self.v_form.v = self.q_form.u, self.q_form.v
        self.b = nn.Parameter(torch.zeros(d))

    def forward(self, x: Tensor) -> Tensor:
        tokens, batch, d = x.shape
        size = d // self.heads

        def by_head(y: Tensor) -> Tensor:
            return y.reshape(tokens, batch * self.heads, size).transpose(0, 1)

        def scrambled(form: KroneckerSum) -> Tensor:
            return (form.along(x, None) + self.b).reshape(batch * self.heads, tokens, size)

        q, k, v = (by_head(y) for y in self.in_proj(x).chunk(3, dim=-1))
        q = q / math.sqrt(size) + scrambled(self.q_form)
        v = v + scrambled(self.v_form)
        out = (q @ k.transpose(1, 2)).softmax(-1) @ v
        return self.out_proj(out.transpose(0, 1).reshape(tokens, batch, d))


class PevitBlock(nn.Module):
    def __init__(self, config: Config, slow: list[tuple[nn.Parameter, ...]]) -> None:
        super().__init__()
        d = config["width"]
        self.ln_1, self.ln_2 = (nn.LayerNorm(d, eps=config["norm_eps"]) for _ in range(2))
        self.attn = PevitAttention(config, slow)
        self.c_fc, self.c_proj = nn.Linear(d, 4 * d), nn.Linear(4 * d, d)
        self.act = make_activation(config["act"])

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln_1(x))
        return x + self.c_proj(self.act(self.c_fc(self.ln_2(x))))


class PevitVit(nn.Module):
    """CLIP's image tower; everything but the adapters is frozen."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        d, side = config["width"], config["input_resolution"] // config["patch_size"]
        eps = config["norm_eps"]
        self.conv1 = nn.Conv2d(3, d, config["patch_size"], stride=config["patch_size"], bias=False)
        self.class_embedding = nn.Parameter(torch.zeros(d))
        self.positional_embedding = nn.Parameter(torch.zeros(side * side + 1, d))
        self.ln_pre, self.ln_post = nn.LayerNorm(d, eps=eps), nn.LayerNorm(d, eps=eps)
        slow = [slow_matrices(config["n"], config["slow_rank"]) for _ in range(2)]
        self.resblocks = nn.ModuleList(PevitBlock(config, slow) for _ in range(config["layers"]))
        self.proj = nn.Parameter(torch.zeros(d, config["output_dim"]))

    def forward(self, image: Tensor) -> Tensor:
        patches = self.conv1(image).flatten(2).permute(2, 0, 1)
        first = self.class_embedding.expand(1, patches.shape[1], -1)
        x = self.ln_pre(torch.cat([first, patches]) + self.positional_embedding[:, None])
        for block in self.resblocks:
            x = block(x)
        return self.ln_post(x[0]) @ self.proj


class PevitCase(GoldenCase):
    """Image in, ``features`` and the blocks' outputs (tokens, batch, width) out."""

    def __init__(self, model: PevitVit, layers: int) -> None:
        self._model = model.eval()
        self._layers = layers
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(any(part in name for part in ("q_form", "v_form", "attn.b")))

    def name_of(self, key: str) -> str | None:
        if self.is_dead(key) or ".attn.phm_rule" in key:  # the tied copies of the rules are dropped
            return None
        name = key.removeprefix("transformer.").replace(".mlp.", ".").replace(".in_proj_", ".in_proj.")
        for number, form in (("1", "q_form"), ("2", "v_form")):
            name = name.replace(f"phm_rule{number}_", f"resblocks.0.attn.{form}.slow_")
        name = name.replace("q_proj_adapter1_left", "q_form.u").replace("q_proj_adapter1_right", "q_form.v")
        if name not in self.state():
            raise StateError(f"official key {key!r} has no place: we have no tensor {name!r}")
        return name

    def is_dead(self, key: str) -> bool:
        return ".v_proj_adapter1_" in key

    def state(self) -> Tensors:
        return dict(self.parameters())

    def parameters(self) -> dict[str, nn.Parameter]:
        return dict(self._model.named_parameters())  # shared ones once, under their first name

    def adapter_parameters(self) -> set[str]:
        return {name for name, parameter in self.parameters().items() if parameter.requires_grad}

    def frozen(self) -> Tensors:
        return {name: parameter for name, parameter in self.parameters().items() if not parameter.requires_grad}

    def train(self, mode: bool) -> None:
        self._model.train(mode)

    def run(self, inputs: Tensors) -> Tensors:
        outputs: Tensors = {}
        blocks = list(self._model.resblocks)
        handles = [
            block.register_forward_hook(lambda _, args, out, i=i: outputs.update({f"block{i}": out}))
            for i, block in enumerate(blocks)
        ]
        try:
            outputs["features"] = self._model(inputs["image"])
        finally:
            for handle in handles:
                handle.remove()
        return outputs

    def loss(self, outputs: Tensors) -> Tensor:
        return outputs["features"].square().mean()
