"""Builders of the system ``unified_view``: our methods on single layers of BART, mBART and RoBERTa."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import transformers as hf
from torch import Tensor, nn
from transformers.models.bart.modeling_bart import BartDecoderLayer, BartEncoderLayer
from transformers.models.mbart.modeling_mbart import MBartEncoderLayer
from transformers.models.roberta.modeling_roberta import RobertaLayer

import torchgraft as tg
from torchgraft.methods.forms.adapter_layer import AdapterLayer
from torchgraft.methods.forms.prefix import FreePrefix, NetPrefix, PrefixNet
from torchgraft.official.assembly import BACKBONE, Assembly, OfficialError
from torchgraft.official.unified_view import Tuning, UnifiedViewCode

from ..case import Config, GoldenCase, Merged, StateError, Tensors
from ..files import CaseError

_NETS = {"wte": ("self", "embedding"), "wte2": ("encoder_decoder", "embedding"), "wte_enc": ("encoder", "embedding")}
_KINDS = {"encoder": "encoder", "decoder_self": "self", "decoder_cross": "encoder_decoder"}
_LAYERS = {"control_trans": "self", "control_trans2": "encoder_decoder", "control_trans_enc": "encoder"}


def adapter_forms(config: Config, mode: str) -> GoldenCase:
    """The adapter layer in all its forms, and LoRA on a linear layer."""
    return FormsCase(config)


def prefix(config: Config, mode: str) -> GoldenCase:
    """The two makers of prefixes."""
    return PrefixCase(config)


def encoder_layer(config: Config, mode: str) -> GoldenCase:
    """Several adapters on one encoder layer, each active in turn."""
    host = config["host"]
    known = {"bart": ("post", BartEncoderLayer), "mbart": ("pre", MBartEncoderLayer)}
    if host not in known or config["norm"] != known[host][0]:
        expected = {name: norm for name, (norm, _) in known.items()}
        raise CaseError(f"host {host!r} with norm {config['norm']!r}; expected one of {expected}")
    settings = _bart(config, hf.MBartConfig if host == "mbart" else hf.BartConfig)
    shared = {"mid_dim": config["mid_dim"], "lora_alpha": config["lora_alpha"]}
    variants = {name: {**dict(variant), **shared} for name, variant in config["variants"].items()}
    layer = _with_eps(known[host][1](settings), config)
    return LayerCase(EncoderHost(layer, config["d_model"]), variants, normed=host == "bart", several=True)


def roberta_layer(config: Config, mode: str) -> GoldenCase:
    """MAM on RoBERTa."""
    settings = hf.RobertaConfig(
        hidden_size=config["d_model"],
        num_attention_heads=config["heads"],
        intermediate_size=config["ffn"],
        layer_norm_eps=config["norm_eps"],
        hidden_act=_act(config),
        attn_implementation="eager",
    )
    return LayerCase(EncoderHost(RobertaLayer(settings), config["d_model"]), {"mam": _mam(config)})


def bart_decoder_layer(config: Config, mode: str) -> GoldenCase:
    """MAM on a layer with self-attention and cross-attention."""
    layer = _with_eps(BartDecoderLayer(_bart(config, hf.BartConfig), layer_idx=0), config)
    return LayerCase(DecoderHost(layer, config["d_model"]), {"mam": _mam(config)})


FORMS = {
    "adapter_forms": adapter_forms,
    "prefix": prefix,
    "encoder_layer": encoder_layer,
    "roberta_layer": roberta_layer,
    "bart_decoder_layer": bart_decoder_layer,
}


class Host(nn.Module):
    """One layer of transformers behind what stands for the embeddings, which the first layer of a model has to be."""

    def __init__(self, layer: nn.Module, name: str, width: int) -> None:
        super().__init__()
        self.stem = nn.Linear(width, width, bias=False)
        nn.init.eye_(self.stem.weight)
        self.add_module(name, nn.ModuleList([layer]))

    def embedded(self, x: Tensor) -> Tensor:
        """``x`` as it is."""
        if x.dim() != 3:
            raise ValueError(f"expected (B, L, d), got {tuple(x.shape)}")
        return self.stem(x)


class EncoderHost(Host):
    """An encoder layer."""

    def __init__(self, layer: nn.Module, width: int) -> None:
        super().__init__(layer, "layers", width)

    def forward(self, x: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        out = self.layers[0](self.embedded(x), attention_mask)
        return out if isinstance(out, Tensor) else out[0]


class DecoderHost(Host):
    """A decoder layer; without a second sequence it reads the first."""

    def __init__(self, layer: nn.Module, width: int) -> None:
        super().__init__(layer, "decoder", width)

    def forward(
        self,
        x: Tensor,
        attention_mask: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
    ) -> Tensor:
        x = self.embedded(x)
        other = x if encoder_hidden_states is None else encoder_hidden_states
        out = self.decoder[0](
            x,
            attention_mask=attention_mask,
            encoder_hidden_states=other,
            encoder_attention_mask=encoder_attention_mask,
        )
        return out if isinstance(out, Tensor) else out[0]


class LayerCase(GoldenCase):
    """One frozen layer and an adapter per variant; official keys begin with the variant's name or with ``shared``.

    Our names: ``backbone.KEY`` and ``VARIANT/NAME``.

    Args:
        host: The layer in its wrapper.
        variants: Name -> what the official script was told.
        normed: Whether the host is BART, whose multi-head adapter has a norm of its own.
        several: Whether the case names its variants; otherwise it has one, and its output is ``hidden``.
    """

    def __init__(
        self, host: nn.Module, variants: Mapping[str, dict[str, Any]], *, normed: bool = False, several: bool = False
    ) -> None:
        self._host, self._several = host.eval(), several
        self._backbone = {k: t for k, t in host.state_dict(keep_vars=True).items() if not k.startswith("stem.")}
        self._assemblies: dict[str, Assembly] = {}
        for name, told in variants.items():
            tuning = _tuning({**told, "normed": normed and told.get("attn_option") == "cross_attn_relu"})
            tg.activate(host, None)
            system = UnifiedViewCode(host, **told)
            adapter = tg.attach(host, tuning, name=name, lean=False)
            self._assemblies[name] = Assembly(system, adapter, self._backbone)

    def name_of(self, key: str) -> str | None:
        variant, inner = self._split(key)
        try:
            found = self._assemblies[variant].names(inner)
        except OfficialError as error:
            raise StateError(str(error)) from error
        return None if found is None else _ours(variant, found[0])

    def is_dead(self, key: str) -> bool:
        variant, inner = self._split(key)
        return self._assemblies[variant].system.is_dead(inner)

    def state(self) -> Tensors:
        return {_ours(v, n): t for v, a in self._assemblies.items() for n, t in a.tensors().items()}

    def parameters(self) -> dict[str, nn.Parameter]:
        return {n: t for n, t in self.state().items() if isinstance(t, nn.Parameter)}

    def adapter_parameters(self) -> set[str]:
        return {n for n in self.parameters() if not n.startswith(f"{BACKBONE}.")}

    def frozen(self) -> Tensors:
        return self._backbone

    def train(self, mode: bool) -> None:
        self._host.train(mode)

    def run(self, inputs: Tensors) -> Tensors:
        outputs: Tensors = {}
        for variant in self._assemblies:
            tg.activate(self._host, variant)
            outputs[variant if self._several else "hidden"] = self._host(**inputs)
        return outputs

    def loss(self, outputs: Tensors) -> Tensor:
        return _squares(outputs)

    def _split(self, key: str) -> tuple[str, str]:
        if not self._several:
            return next(iter(self._assemblies)), key
        variant, _, inner = key.partition(".")
        if variant == "shared":
            return next(iter(self._assemblies)), inner
        if variant not in self._assemblies:
            raise StateError(f"official key {key!r} belongs to no variant of the case")
        return variant, inner


class FormsCase(GoldenCase):
    """Adapter layers on their own, and a linear layer with LoRA attached to it."""

    def __init__(self, config: Config) -> None:
        if config["act"] != "relu":
            raise CaseError(f"unknown act {config['act']!r}, expected 'relu'")
        d, width, lora = config["d"], config["bottleneck"], config["lora"]
        scale = config["scaled_parallel_s"]
        self._layers = nn.ModuleDict(
            {
                "sequential_plain": AdapterLayer(d, width, dropout=config["dropout"]),
                "sequential_ln_in": AdapterLayer(d, width, layer_norm="in", dropout=config["dropout"]),
                "sequential_ln_out": AdapterLayer(d, width, layer_norm="out", dropout=config["dropout"]),
                "scaled_parallel": AdapterLayer(d, width, scale=scale, dropout=config["dropout"]),
                "learnable_scale": AdapterLayer(d, width, scale="learned", dropout=config["dropout"]),
            }
        ).eval()
        self._linear = nn.Sequential(nn.Linear(d, lora["out_features"])).eval()
        self._frozen = {f"lora_linear.{k}": t for k, t in self._linear[0].state_dict(keep_vars=True).items()}
        method = tg.methods.LoRA(rank=lora["r"], alpha=lora["alpha"], targets="linear")
        self._lora = tg.attach(self._linear, method, include="0", lean=False)

    def name_of(self, key: str) -> str | None:
        module, _, inner = key.partition(".")
        if module == "lora_linear":
            name = inner.replace("ef_lora_A", "down").replace("ef_lora_B", "up")
        elif module in self._layers:
            name = inner
            for theirs, ours in (("down_proj", "down"), ("up_proj", "up"), ("adapter_layer_norm_before", "norm")):
                name = name.replace(theirs, ours)
        else:
            raise StateError(f"official key {key!r} belongs to no module of the case")
        return f"{module}.{name}"

    def state(self) -> Tensors:
        layers = dict(self._layers.state_dict(keep_vars=True))
        added = {f"lora_linear.{n.rpartition('.')[2]}": p for n, p in self._lora.named_parameters()}
        return layers | self._frozen | added

    def parameters(self) -> dict[str, nn.Parameter]:
        return {n: t for n, t in self.state().items() if isinstance(t, nn.Parameter)}

    def adapter_parameters(self) -> set[str]:
        return self.parameters().keys() - self._frozen.keys()

    def frozen(self) -> Tensors:
        return self._frozen

    def train(self, mode: bool) -> None:
        self._layers.train(mode)
        self._linear.train(mode)

    def run(self, inputs: Tensors) -> Tensors:
        x, layers = inputs["x"], self._layers
        # The reference lists the gradient of the frozen bias too.
        self._linear[0].bias.requires_grad_(True)
        return {
            **{n: x + layers[n](x) for n in ("sequential_plain", "sequential_ln_in", "sequential_ln_out")},
            "pfeiffer_residual": inputs["residual"] + layers["sequential_plain"](x),
            "scaled_parallel_delta": layers["scaled_parallel"](x),
            "learnable_scale": x + layers["learnable_scale"](x),
            "lora_linear": self._linear(x),
        }

    def loss(self, outputs: Tensors) -> Tensor:
        return _squares(outputs)

    def merged(self, inputs: Tensors) -> Merged:
        tg.merge(self._linear, probe=inputs["x"])
        weights = {f"lora_linear.{n}": t.detach().clone() for n, t in self._linear[0]._parameters.items()}
        outputs = {n: t.detach() for n, t in self.run(inputs).items()}
        tg.unmerge(self._linear)
        return Merged({}, weights, outputs)


class PrefixCase(GoldenCase):
    """Keys and values of every layer and kind of attention, from nets and free."""

    def __init__(self, config: Config) -> None:
        if config["act"] != "tanh":
            raise CaseError(f"unknown act {config['act']!r}, expected 'tanh'")
        self._config = config
        length, d, layers = config["prefix_len"], config["d_model"], range(config["layers"])
        self._forms = nn.ModuleDict()
        for kind in _KINDS.values():
            net = PrefixNet(length, d, config["mid_dim"], 2 * d * len(layers))
            for i in layers:
                self._forms[f"reparam/{i}/{kind}"] = NetPrefix(net, 2 * d * i, d, d)
                self._forms[f"direct/{i}/{kind}"] = FreePrefix(length, d, d)

    def name_of(self, key: str) -> str | None:
        maker, first, *rest = key.split(".")
        if maker == "reparam" and first in _NETS:
            return f"reparam/0/{_NETS[first][0]}.net.embedding"
        if maker == "reparam" and first in _LAYERS and rest[0] in ("0", "2"):
            return f"reparam/0/{_LAYERS[first]}.net.{'down' if rest[0] == '0' else 'up'}.{rest[1]}"
        kind, _, what = first.rpartition("_attn_")
        if maker != "direct" or kind not in _KINDS or what not in ("key", "value"):
            raise StateError(f"official key {key!r} belongs to no maker of the case")
        return f"direct/{rest[0]}/{_KINDS[kind]}.{what}s"

    def state(self) -> Tensors:
        return dict(self._forms.named_parameters())  # those of a shared net once

    def parameters(self) -> dict[str, nn.Parameter]:
        return dict(self._forms.named_parameters())

    def adapter_parameters(self) -> set[str]:
        return set(self.parameters())

    def frozen(self) -> Tensors:
        return {}

    def train(self, mode: bool) -> None:
        self._forms.train(mode)

    def run(self, inputs: Tensors) -> Tensors:
        outputs = {}
        for name, form in self._forms.items():
            for what, rows in zip(("key", "value"), form(), strict=True):
                heads = rows.unflatten(-1, (self._config["heads"], -1)).transpose(0, 1)
                outputs[f"{name.replace('/', '.')}.{what}"] = heads.repeat(self._config["batch"], 1, 1)
        return outputs

    def loss(self, outputs: Tensors) -> Tensor:
        return _squares(outputs)


def _act(config: Config) -> str:
    if config["act"] not in ("gelu", "relu"):
        raise CaseError(f"unknown act {config['act']!r}, expected 'gelu' or 'relu'")
    return config["act"]


def _with_eps(layer: nn.Module, config: Config) -> nn.Module:
    """BART's own configuration does not name the epsilon of its norms."""
    for module in layer.modules():
        if isinstance(module, nn.LayerNorm):
            module.eps = config["norm_eps"]
    return layer


def _bart(config: Config, kind: type) -> Any:
    return kind(
        d_model=config["d_model"],
        encoder_attention_heads=config["heads"],
        decoder_attention_heads=config["heads"],
        encoder_ffn_dim=config["ffn"],
        decoder_ffn_dim=config["ffn"],
        activation_function=_act(config),
        attn_implementation="eager",
    )


def _mam(config: Config) -> dict[str, Any]:
    return {
        "attn_mode": "prefix",
        "attn_option": "concat",
        "attn_bottleneck": config["prefix_len"],
        "ffn_mode": "adapter",
        "ffn_option": "parallel",
        "ffn_bottleneck": config["ffn_bottleneck"],
        "ffn_scale": config["ffn_scale"],
        "mid_dim": config["mid_dim"],
    }


def _tuning(told: Mapping[str, Any]) -> tg.Method:
    try:
        return Tuning(**told).method()
    except (tg.GraftError, TypeError) as error:
        raise CaseError(str(error)) from error


def _ours(variant: str, name: str) -> str:
    return name if name.startswith(f"{BACKBONE}.") else f"{variant}/{name}"


def _squares(outputs: Tensors) -> Tensor:
    """The sum over outputs of their mean squares."""
    return sum((t.square().mean() for t in outputs.values()), start=next(iter(outputs.values())).new_zeros(()))
