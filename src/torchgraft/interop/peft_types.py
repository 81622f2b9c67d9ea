"""LoRA, LoKr, LoHa and (IA)^3 as HF peft 0.21 saves them."""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..core.anatomy import Anatomy
from ..core.blocks import class_name
from ..core.layers import ConvGeometry, is_conv, is_standardised, out_channels
from ..core.method import Method
from ..core.placements import Affine, WeightDelta
from ..errors import GraftError
from ..methods.ia3 import IA3
from ..methods.loha import LoHa
from ..methods.lokr import LoKr
from ..methods.lora import LoRA
from .peft_type import DeltaType, Layer, PeftType, tensor_names

_KEEPS_THE_BACKBONE = (True, False, None, "default", "gaussian", "eva", "orthogonal")
"""Starts of LoRA that leave the backbone's own weights as they are."""
_WRONG_AXES = "peft multiplies the wrong axes of a one-dimensional convolution whose w2 is whole"


class LoraType(DeltaType):
    """LoRA, rsLoRA, DoRA."""

    name, ours, joins_rows = "LORA", LoRA, True
    alpha = "lora_alpha"
    dims = (0, 1, 2, 3)
    tensors = tensor_names(r"lora_A\.weight|lora_B\.weight|lora_magnitude_vector(\.weight)?")
    options = frozenset(
        {
            "r",
            "lora_alpha",
            "rank_pattern",
            "alpha_pattern",
            "use_rslora",
            "use_dora",
            "lora_dropout",
            "init_lora_weights",
            "bias",
        }
    )

    def check(self) -> None:
        """Also refuse what trains or changes the backbone itself."""
        super().check()
        bias, start = self.config.get("bias", "none"), self.config.get("init_lora_weights", True)
        if bias not in ("none", None):
            raise GraftError(
                f"{self.where}: bias={bias!r} trains biases of the backbone too; attach 'lora + bitfit' and train anew"
            )
        if start not in _KEEPS_THE_BACKBONE:
            raise GraftError(
                f"{self.where}: init_lora_weights={start!r} changes the backbone's own weights, so the file is not all "
                "of the adapter; save it with path_initial_model_for_weight_conversion in peft"
            )

    def rank(self, layer: Layer) -> int:
        """The rows of A."""
        return layer.tensors["lora_A.weight"].shape[0] if "lora_A.weight" in layer.tensors else super().rank(layer)

    def method(self, layers: Mapping[str, Layer], anatomy: Anatomy) -> Method:
        """LoRA with the ranks of the tensors."""
        dropout, dora = float(self.number("lora_dropout", 0)), bool(self.config.get("use_dora"))
        inputs = all(anatomy.site(path).fires for path in layers) and not dora
        if dropout and not inputs:
            warnings.warn(f"{self.where}: lora_dropout={dropout} acts in training only and is left out", stacklevel=4)
        return LoRA(
            **self.settings(layers, anatomy),
            rslora=bool(self.config.get("use_rslora")),
            dropout=dropout if inputs else 0.0,
            dora=dora,
        )

    def rank_of(self, placements: list[Any]) -> int:
        """The ranks of all its rows together."""
        return sum(p.form.down.shape[0] for p in placements)

    def written(self, method: LoRA, homes: Mapping[str, list[Any]]) -> dict[str, Any]:
        """Also the kind of scale, the magnitude and the dropout."""
        return {
            **super().written(method, homes),
            "use_rslora": method.rslora,
            "use_dora": method.dora,
            "lora_dropout": method.dropout,
            "bias": "none",
        }

    def load(self, placement: WeightDelta, layer: Layer) -> None:
        """A, B and m; a rank above ours is more than the product needs, so it is refitted."""
        form: Any = placement.form
        _refit(layer, "lora_A.weight", "lora_B.weight", form.down, form.up)
        _copy(form.down, layer.take("lora_A.weight", form.down, self.where))
        _copy(form.up, layer.take("lora_B.weight", form.up, self.where))
        if hasattr(form, "magnitude"):
            old = "lora_magnitude_vector.weight" in layer.tensors
            name = "lora_magnitude_vector.weight" if old else "lora_magnitude_vector"
            if name in layer.tensors:
                layer.tensors[name] = layer.tensors[name].flatten()
            _copy(form.magnitude, layer.take(name, form.magnitude, self.where))

    def dump(self, placements: list[WeightDelta], path: str, anatomy: Anatomy) -> dict[str, Tensor]:
        """Rows of a fused layer become one delta of the whole, of the sum of their ranks, with zeros between."""
        forms: list[Any] = [p.form for p in placements]
        whole = anatomy.module(path)._parameters[placements[0].parameter]
        assert whole is not None
        rank = sum(f.down.shape[0] for f in forms)
        down = torch.cat([f.down for f in forms])
        up, column = down.new_zeros(whole.shape[0], rank), 0
        norms = torch.linalg.vector_norm(whole.detach().flatten(1), dim=1).to(down.dtype)
        for placement, form in zip(placements, forms, strict=True):
            rows = slice(None) if placement.rows is None else placement.rows
            up[rows, column : column + form.down.shape[0]] = form.up
            column += form.down.shape[0]
            if hasattr(form, "magnitude"):
                norms[rows] = form.magnitude
        ones = [1] * (whole.dim() - 2)
        found = {
            "lora_A.weight": down.reshape(rank, *whole.shape[1:]),
            "lora_B.weight": up.reshape(whole.shape[0], rank, *ones),
        }
        if hasattr(forms[0], "magnitude"):
            # peft keeps it as a vector beside a linear layer, as a map of one pixel beside a convolution.
            found["lora_magnitude_vector"] = norms.reshape(1, -1, *ones) if ones else norms
        return found


class LokrType(DeltaType):
    """LoKr."""

    name, ours = "LOKR", LoKr
    tensors = tensor_names(r"lokr_(w1|w1_a|w1_b|w2|w2_a|w2_b|t2)")
    options = frozenset(
        {
            "r",
            "alpha",
            "rank_pattern",
            "alpha_pattern",
            "decompose_both",
            "decompose_factor",
            "use_effective_conv2d",
            "rank_dropout",
            "module_dropout",
            "rank_dropout_scale",
        }
    )

    def method(self, layers: Mapping[str, Layer], anatomy: Anatomy) -> Method:
        """LoKr with the same factors."""
        factor = self.config.get("decompose_factor", -1)
        return LoKr(
            **self.settings(layers, anatomy),
            decompose_both=bool(self.config.get("decompose_both")),
            decompose_factor=factor if isinstance(factor, int) else 0,
            use_effective_conv2d=bool(self.config.get("use_effective_conv2d")),
        )

    def rank_of(self, placements: list[Any]) -> int:
        """The rank that was asked for: whole factors do not show it."""
        return int(placements[0].form.rank)

    def load(self, placement: WeightDelta, layer: Layer) -> None:
        """The factors, one by one."""
        form: Any = placement.form
        if placement.geometry is not None and placement.geometry.dims == 1 and "lokr_w2" in layer.tensors:
            raise GraftError(f"{self.where}: {layer.name}: {_WRONG_AXES}; it cannot be read as the product it is not")
        for name, parameter in form.named_parameters():
            _copy(parameter, layer.take(f"lokr_{name}", parameter, self.where))

    def dump(self, placements: list[WeightDelta], path: str, anatomy: Anatomy) -> dict[str, Tensor]:
        """The factors; peft gives a one-dimensional core a second axis."""
        (placement,) = placements
        form: Any = placement.form
        if len(form.kernel) == 1 and hasattr(form, "w2"):
            raise GraftError(f"lokr at {path!r}: {_WRONG_AXES}; choose a smaller rank, or exclude it")
        found = {f"lokr_{name}": p.detach() for name, p in form.named_parameters()}
        if "lokr_t2" in found and len(form.kernel) == 1:
            found["lokr_t2"] = found["lokr_t2"].unsqueeze(-1)
        return found


class LohaType(DeltaType):
    """LoHa."""

    name, ours = "LOHA", LoHa
    tensors = tensor_names(r"hada_(w1_a|w1_b|w2_a|w2_b|t1|t2)")
    options = frozenset(
        {"r", "alpha", "rank_pattern", "alpha_pattern", "use_effective_conv2d", "rank_dropout", "module_dropout"}
    )

    def method(self, layers: Mapping[str, Layer], anatomy: Anatomy) -> Method:
        """LoHa with the ranks of the configuration."""
        effective = bool(self.config.get("use_effective_conv2d"))
        return LoHa(**self.settings(layers, anatomy), use_effective_conv2d=effective)

    def rank_of(self, placements: list[Any]) -> int:
        """The rank of each product."""
        form = placements[0].form
        return int(form.w1_b.shape[0])

    def load(self, placement: WeightDelta, layer: Layer) -> None:
        """The factors; a rank above ours is refitted."""
        form: Any = placement.form
        if not hasattr(form, "t1"):
            _refit(layer, "hada_w1_b", "hada_w1_a", form.w1_b, form.w1_a)
            _refit(layer, "hada_w2_b", "hada_w2_a", form.w2_b, form.w2_a)
        for name, parameter in form.named_parameters():
            _copy(parameter, layer.take(f"hada_{name}", parameter, self.where))

    def dump(self, placements: list[WeightDelta], path: str, anatomy: Anatomy) -> dict[str, Tensor]:
        """The factors; peft gives a one-dimensional core a second axis."""
        (placement,) = placements
        found = {f"hada_{name}": p.detach() for name, p in placement.form.named_parameters()}
        flat = [n for n in ("hada_t1", "hada_t2") if n in found and found[n].dim() == 3]
        return found | {n: found[n].unsqueeze(-1) for n in flat}


class Ia3Type(PeftType):
    """(IA)^3."""

    name, ours, joins_rows = "IA3", IA3, True
    dims = (0, 2, 3)
    tensors = tensor_names("ia3_l")
    options = frozenset({"feedforward_modules"})

    def method(self, layers: Mapping[str, Layer], anatomy: Anatomy) -> Method:
        """(IA)^3 whose inputs and outputs are those of peft."""
        fed = tuple(anatomy.address(path) for path, layer in layers.items() if self._is_fed(layer.name))
        return IA3(targets="all", feedforward=fed)

    def _is_fed(self, name: str) -> bool:
        """Whether the input of the layer is scaled, by peft's rule."""
        listed = self.config.get("feedforward_modules") or []
        if isinstance(listed, str):
            try:
                return bool(re.fullmatch(listed, name))
            except re.error as error:
                raise GraftError(f"{self.where}: feedforward_modules={listed!r} cannot be read ({error})") from error
        if not isinstance(listed, list):
            raise GraftError(f"{self.where}: feedforward_modules={listed!r} is not valid; expected a list of names")
        return any(name.endswith(str(target)) for target in listed)

    def load(self, placement: Affine, layer: Layer) -> None:
        """The one vector."""
        assert placement.scale is not None
        if "ia3_l" in layer.tensors:
            layer.tensors["ia3_l"] = layer.tensors["ia3_l"].flatten()
        _copy(placement.scale, layer.take("ia3_l", placement.scale, self.where))

    def written(self, method: IA3, homes: Mapping[str, list[Any]]) -> dict[str, Any]:
        """Whose inputs are scaled, as one expression: peft takes a list by its endings."""
        fed = sorted(path for path, placements in homes.items() if placements[0].side == "input")
        return {"feedforward_modules": "|".join(re.escape(path) for path in fed)}

    def dump(self, placements: list[Affine], path: str, anatomy: Anatomy) -> dict[str, Tensor]:
        """Rows of a fused layer become a vector over the whole, with ones between."""
        layer = anatomy.module(path)
        first = placements[0]
        assert first.scale is not None
        scale = first.scale.detach().new_ones(first.scale.numel() if first.rows is None else out_channels(layer) or 0)
        for placement in placements:
            assert placement.scale is not None
            scale[slice(None) if placement.rows is None else placement.rows] *= placement.scale.detach()
        if is_conv(layer):
            return {"ia3_l": scale.view(1, -1, *[1] * ConvGeometry.of(layer).dims)}
        return {"ia3_l": scale.view(1, -1) if first.side == "input" else scale.view(-1, 1)}


TYPES: dict[str, type[PeftType]] = {t.name: t for t in (LoraType, LokrType, LohaType, Ia3Type)}
"""The types that can be read and written."""


def reason_against(kind: type[PeftType], module: nn.Module, *, writing: bool) -> str:
    """Why peft's adapter of this type is something else at ``module`` than ours; empty: it is the same."""
    if isinstance(module, nn.MultiheadAttention):
        return "peft adds the change of out_proj of nn.MultiheadAttention twice"
    if not is_conv(module):
        return "" if isinstance(module, nn.Linear) else f"{class_name(module)} is no linear layer or convolution"
    geometry = ConvGeometry.of(module)
    if geometry.transposed or geometry.dims not in kind.dims:
        return f"peft has no {kind.name} for {class_name(module)}"
    if kind is not Ia3Type and geometry.padding_mode != "zeros":
        return f"peft pads with zeros, the layer by {geometry.padding_mode}"
    if kind is LoraType:
        if int(module.groups) > 1:  # type: ignore[arg-type]
            return "peft's LoRA of a grouped convolution is a dense one"
        if is_standardised(module):
            return "peft standardises A, the layer its own weight"
        if writing and any(d > 1 for d in geometry.dilation):
            return "peft leaves out the dilation"
        return ""
    return "peft leaves out the SAME padding" if geometry.same and kind is not Ia3Type else ""


def _refit(layer: Layer, down: str, up: str, our_down: Tensor, our_up: Tensor) -> None:
    """Give ``up @ down`` our rank where it has a larger one: ours is cut to the smaller side, as much as it can use."""
    a, b = layer.tensors.get(down), layer.tensors.get(up)
    if a is None or b is None:
        return
    a, b, rank = a.flatten(1), b.flatten(1), our_down.shape[0]
    sides = (a.shape[1], b.shape[0]) == (our_down[0].numel(), our_up.shape[0])
    if a.shape[0] == b.shape[1] > rank and sides:
        product, ones = b.double() @ a.double(), torch.eye(rank, dtype=torch.float64)
        narrow, wide = (ones, product) if a.shape[1] == rank else (product, ones)
        layer.tensors |= {down: narrow.to(a.dtype), up: wide.to(b.dtype)}


def _copy(parameter: nn.Parameter, value: Tensor) -> None:
    with torch.no_grad():
        parameter.copy_(value)
