"""Layer kinds: what a layer is, where its channels sit, and how a branch beside it must slide its kernel.

A branch that runs parallel to a convolution has to sample the same grid: same stride, dilation and padding
rule, including timm's TensorFlow-style SAME padding (asymmetric, computed from the input size) and the
padding modes of ``nn.ConvNd``. :class:`ConvGeometry` carries these and builds such branches.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import Conv2dSame
from timm.layers.padding import pad_same
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.modules.instancenorm import _InstanceNorm

from ..errors import GraftError
from ..swap import original_class

CONVS: dict[tuple[int, bool], Any] = {
    (1, False): nn.Conv1d,
    (2, False): nn.Conv2d,
    (3, False): nn.Conv3d,
    (1, True): nn.ConvTranspose1d,
    (2, True): nn.ConvTranspose2d,
    (3, True): nn.ConvTranspose3d,
}
CONVOLVE: dict[int, Any] = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
_TRANSPOSED: dict[int, Any] = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}


def is_conv(module: nn.Module) -> bool:
    """Whether ``module`` is a convolution of any kind, transposed ones included."""
    return isinstance(module, _ConvNd)


def is_batchnorm(module: nn.Module) -> bool:
    """Whether ``module`` keeps running statistics (BatchNorm of any kind, timm's BatchNormAct included)."""
    return isinstance(module, _BatchNorm)


def is_norm(module: nn.Module) -> bool:
    """Whether ``module`` is a normalisation layer with (or without) an affine part, from any library."""
    if isinstance(module, (_BatchNorm, _InstanceNorm, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)):
        return True
    name = original_class(module).__name__.lower()
    leaf = any(p is not None for p in module._parameters.values())
    return leaf and any(word in name for word in ("layernorm", "rmsnorm", "batchnorm", "groupnorm"))


def is_standardised(module: nn.Module) -> bool:
    """Whether the layer standardises its weight in every forward (StdConv2d, ScaledStdConv2d and kin)."""
    return is_conv(module) and any("StdConv" in c.__name__ for c in type(module).__mro__)


def kind_of(module: nn.Module) -> str:
    """The layer kind, as printed in tables and used to look up what a placement supports.

    One of ``linear``, ``conv{1,2,3}d`` with a prefix ``depthwise-``, ``grouped-``, ``dilated-``, ``std-``,
    ``same-`` where it applies, ``conv_transpose{1,2,3}d``, ``batchnorm``, ``layernorm``, ``groupnorm``,
    ``instancenorm``, ``attention``, ``embedding``, or the class name in lower case.
    """
    if isinstance(module, nn.Linear):
        return "linear"
    if isinstance(module, _ConvNd):
        geometry = ConvGeometry.of(module)
        marks = []
        if is_standardised(module):
            marks.append("std")
        if geometry.same:
            marks.append("same")
        if module.groups > 1:
            marks.append("depthwise" if module.groups == module.in_channels else "grouped")
        if any(d > 1 for d in module.dilation):
            marks.append("dilated")
        if module.padding_mode != "zeros":
            marks.append(module.padding_mode)
        stem = "conv_transpose" if geometry.transposed else "conv"
        return "-".join([*marks, f"{stem}{geometry.dims}d"])
    if is_batchnorm(module):
        return "batchnorm"
    if isinstance(module, nn.GroupNorm):
        return "groupnorm"
    if isinstance(module, _InstanceNorm):
        return "instancenorm"
    if is_norm(module):
        return "layernorm"
    if isinstance(module, nn.MultiheadAttention):
        return "attention"
    if isinstance(module, nn.Embedding):
        return "embedding"
    return original_class(module).__name__.lower()


def in_channels(module: nn.Module) -> int | None:
    """Input channels or features of a layer, None where the word has no meaning."""
    for name in ("in_channels", "in_features", "num_features"):
        value = getattr(module, name, None)
        if isinstance(value, int):
            return value
    return _norm_width(module)


def out_channels(module: nn.Module) -> int | None:
    """Output channels or features of a layer, None where the word has no meaning."""
    for name in ("out_channels", "out_features", "num_features"):
        value = getattr(module, name, None)
        if isinstance(value, int):
            return value
    return _norm_width(module)


def channel_axis(module: nn.Module) -> int:
    """The axis of the output that holds the channels: 1 for convolutions and maps, -1 for tokens."""
    if isinstance(module, (_ConvNd, _BatchNorm, _InstanceNorm, nn.GroupNorm)):
        return 1
    if is_norm(module):
        first = "2d" in original_class(module).__name__ or getattr(module, "data_format", "") == "channels_first"
        return 1 if first else -1
    return -1


def _norm_width(module: nn.Module) -> int | None:
    shape = getattr(module, "normalized_shape", None)
    if shape is not None and len(shape) == 1:
        return int(shape[0])
    if is_norm(module):
        weight = module._parameters.get("weight")
        return None if weight is None else weight.numel()
    return None


@dataclasses.dataclass(frozen=True)
class ConvGeometry:
    """How a convolution slides over its input; enough to build another one that samples the same grid.

    Attributes:
        dims: 1, 2 or 3 spatial dimensions.
        kernel: Kernel size per dimension; likewise ``stride``, ``dilation``, ``output_padding``.
        padding: Zero padding per dimension, or the string ``"same"`` / ``"valid"`` of ``nn.ConvNd``.
        padding_mode: ``zeros``, ``reflect``, ``replicate`` or ``circular``.
        same: TensorFlow-style SAME padding, computed from the input size (timm's ``*Same`` layers).
        transposed: A transposed convolution.
    """

    dims: int
    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...] | str
    dilation: tuple[int, ...]
    padding_mode: str = "zeros"
    same: bool = False
    transposed: bool = False
    output_padding: tuple[int, ...] = ()

    @classmethod
    def of(cls, conv: nn.Module) -> ConvGeometry:
        """The geometry of an existing convolution."""
        assert isinstance(conv, _ConvNd), type(conv)
        return cls(
            dims=len(conv.kernel_size),
            kernel=tuple(conv.kernel_size),
            stride=tuple(conv.stride),
            padding=conv.padding if isinstance(conv.padding, str) else tuple(conv.padding),
            dilation=tuple(conv.dilation),
            padding_mode=conv.padding_mode,
            same=isinstance(conv, Conv2dSame) or bool(getattr(conv, "same_pad", False)),
            transposed=isinstance(conv, _ConvTransposeNd),
            output_padding=tuple(conv.output_padding),
        )

    @classmethod
    def keeping_size(cls, dims: int, kernel: int | tuple[int, ...], stride: int = 1, **kw: Any) -> ConvGeometry:
        """A convolution whose output has the size of its input (divided by ``stride``)."""
        sizes = (kernel,) * dims if isinstance(kernel, int) else tuple(kernel)
        odd = all(k % 2 for k in sizes)
        if not odd and stride != 1:
            raise ValueError(f"an even kernel {sizes} with stride {stride} has no symmetric padding")
        padding: tuple[int, ...] | str = tuple(k // 2 for k in sizes) if odd else "same"
        return cls(dims, sizes, (stride,) * dims, padding, (1,) * dims, **kw)

    def with_kernel(self, kernel: int) -> ConvGeometry:
        """The same stride and padding rule with another kernel, so that the output shape stays the same.

        Dilation becomes 1. The padding makes up for the difference in reach, for any input size.

        Raises:
            GraftError: No symmetric padding does so (an even kernel beside an odd one with a stride, a small
                kernel beside a large one without padding).
        """
        reach = kernel - 1
        fresh = dataclasses.replace(self, kernel=(kernel,) * self.dims, dilation=(1,) * self.dims)
        if fresh == self or self.same or self.padding == "same":
            return fresh
        own = [d * (k - 1) for d, k in zip(self.dilation, self.kernel, strict=True)]
        given = (0,) * self.dims if isinstance(self.padding, str) else self.padding
        if self.transposed:
            # Output: (n - 1) stride + grown + 1. Padding is the least that leaves an output padding of 0 or more.
            grown = [o - 2 * p + e for o, p, e in zip(own, given, self.output_padding, strict=True)]
            padding = tuple(max(0, -((g - reach) // 2)) for g in grown)
            rest = tuple(g - reach + 2 * p for g, p in zip(grown, padding, strict=True))
            fits = all(r == 0 or r < s for r, s in zip(rest, self.stride, strict=True))
            fresh = dataclasses.replace(fresh, padding=padding, output_padding=rest)
        else:
            lost = [o - 2 * p for o, p in zip(own, given, strict=True)]  # output: (n - 1 - lost) // stride + 1
            if not any(lost) and reach % 2 and max(self.stride) == 1:
                return dataclasses.replace(fresh, padding="same")
            fits = all(reach >= n and (reach - n) % 2 == 0 for n in lost)
            fresh = dataclasses.replace(fresh, padding=tuple((reach - n) // 2 for n in lost))
        if not fits:
            raise GraftError(
                f"kernel={kernel} cannot give the output shape of a convolution with kernel {self.kernel}, stride "
                f"{self.stride}, padding {self.padding} and dilation {self.dilation}; choose another kernel"
            )
        return fresh

    def build(self, in_channels: int, out_channels: int, *, groups: int = 1, bias: bool = True) -> _ConvNd:
        """A plain convolution with this geometry (never weight-standardised).

        Args:
            in_channels: Input channels.
            out_channels: Output channels.
            groups: Groups; must divide both.
            bias: Whether it has a bias.
        """
        common: dict[str, Any] = {
            "stride": self.stride,
            "dilation": self.dilation,
            "groups": groups,
            "bias": bias,
        }
        if self.same:
            return Conv2dSame(in_channels, out_channels, self.kernel, **common)  # type: ignore[arg-type]
        common |= {"padding": self.padding, "padding_mode": self.padding_mode}
        if self.transposed:
            common["output_padding"] = self.output_padding
        return CONVS[self.dims, self.transposed](in_channels, out_channels, self.kernel, **common)  # type: ignore[arg-type]

    def apply(self, x: Tensor, weight: Tensor, groups: int) -> Tensor:
        """Convolve ``x`` (N, C, *space) with ``weight`` as the layer itself would, without a bias."""
        if self.transposed:
            return _TRANSPOSED[self.dims](
                x, weight, None, self.stride, self.padding, self.output_padding, groups, self.dilation
            )
        padding = self.padding
        if self.same:
            x, padding = (
                pad_same(x, list(self.kernel), list(self.stride), list(self.dilation)),
                (0,) * self.dims,
            )
        elif self.padding_mode != "zeros":
            x, padding = F.pad(x, self._pad_list(), mode=self.padding_mode), (0,) * self.dims
        stride = self.stride
        if max(self.kernel) == 1 and max(stride) > 1 and padding in ("valid", (0,) * self.dims):
            # Reads the same points. On channels-last maps PyTorch 2.14's weight gradient of a 1x1 kernel with a stride
            # writes outside its memory on the CPU.
            read: tuple[Any, ...] = (..., *(slice(None, None, step) for step in stride))
            x, stride = x[read], (1,) * self.dims
        return CONVOLVE[self.dims](x, weight, None, stride, padding, self.dilation, groups)

    def _pad_list(self) -> list[int]:
        if isinstance(self.padding, str):
            total = [
                d * (k - 1) if self.padding == "same" else 0 for d, k in zip(self.dilation, self.kernel, strict=True)
            ]
            sides = [(t // 2, t - t // 2) for t in total]
        else:
            sides = [(p, p) for p in self.padding]
        return [side for pair in reversed(sides) for side in pair]


def activation_like(block: nn.Module, default: str = "relu") -> str:
    """The name of the activation that ``block`` uses, for branches that follow their host.

    The first activation module wins; ``default`` when the block holds none.
    """
    for module in block.modules():
        name = _ACTIVATION_NAMES.get(original_class(module).__name__)
        if name is not None:
            return name
    return default


def make_activation(name: str) -> nn.Module:
    """A fresh activation module by its lower-case name (see :data:`ACTIVATIONS`)."""
    return ACTIVATIONS[name]()


class QuickGELU(nn.Module):
    """``x * sigmoid(1.702 x)``, the activation of OpenAI's CLIP."""

    def forward(self, x: Tensor) -> Tensor:
        """Apply elementwise; any shape."""
        return x * torch.sigmoid(1.702 * x)


ACTIVATIONS: dict[str, type[nn.Module]] = {
    "relu": nn.ReLU,
    "relu6": nn.ReLU6,
    "gelu": nn.GELU,
    "silu": nn.SiLU,
    "hardswish": nn.Hardswish,
    "leaky_relu": nn.LeakyReLU,
    "elu": nn.ELU,
    "mish": nn.Mish,
    "tanh": nn.Tanh,
    "sigmoid": nn.Sigmoid,
    "quick_gelu": QuickGELU,
    "identity": nn.Identity,
}
"""Activations a method may name."""

_ACTIVATION_NAMES = {
    "ReLU": "relu",
    "ReLU6": "relu6",
    "GELU": "gelu",
    "GELUTanh": "gelu",
    "GELUActivation": "gelu",
    "SiLU": "silu",
    "SiLUActivation": "silu",
    "Swish": "silu",
    "Hardswish": "hardswish",
    "HardSwish": "hardswish",
    "HardSwishMe": "hardswish",
    "LeakyReLU": "leaky_relu",
    "ELU": "elu",
    "Mish": "mish",
    "QuickGELU": "quick_gelu",
    "QuickGELUActivation": "quick_gelu",
}
