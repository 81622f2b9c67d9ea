"""The global filter of HorNet-GF: half of the channels see a 3x3 convolution, the other half the whole map.

"HorNet: Efficient High-Order Spatial Interactions with Recursive Gated Convolutions", arXiv:2207.14284, section 3.3.
The filter multiplies the Fourier transform of a map. It is learned for one size of maps and resized for all others,
so that the layer takes any.
"""

import dataclasses
import math
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import LayerNorm2d, trunc_normal_
from torch import Tensor, nn

from ..errors import GraftError

__all__ = ["GlobalLocalFilter", "resized_filter"]


class GlobalLocalFilter(nn.Module):
    """A depthwise convolution and a global filter side by side, (B, D, H, W) -> (B, D, H, W).

    ::

        a, b = halves of pre_norm(x)                            (B, D/2, H, W) each
        b'   = irfft2(K * rfft2(b))                             K: (D/2, H, W // 2 + 1), complex, fft norm "ortho"
        out  = post_norm(dw(a)_0, b'_0, dw(a)_1, b'_1, ...)     the channels of the two halves alternate

    The transform is computed in at least float32, under autocast and with half-precision weights too.

    While ``complex_weight`` is frozen its resized form is kept for the size that was seen last. It is made anew when
    the parameter changes, except through ``parameter.data``, which leaves no trace.

    Args:
        dim: D, even.
        size: Rows and columns (h, w) of the stored filter; that of H x W maps is (H, W // 2 + 1).
        norm_eps: Epsilon of both norms.
        dft_matmul: Compute the transform as products with real matrices. Exporters and compilers that know no complex
            numbers can read this form. It is about as fast as the FFT up to 14 x 14 and slower on larger maps.
        device: Where the parameters are made.
        dtype: Their type.

    Raises:
        GraftError: ``dim`` is odd.
    """

    # TorchScript would take a kept filter for a constant of the model.
    __jit_ignored_attributes__ = ("_kept",)

    def __init__(
        self,
        dim: int,
        size: tuple[int, int],
        norm_eps: float = 1e-6,
        dft_matmul: bool = False,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        if dim % 2:
            raise GraftError(f"a global filter needs an even number of channels, {dim} is odd: choose another width")
        dd = {"device": device, "dtype": dtype}
        half = dim // 2
        self.dft_matmul = dft_matmul
        self.pre_norm = LayerNorm2d(dim, eps=norm_eps, **dd)
        self.dw = nn.Conv2d(half, half, 3, padding=1, groups=half, bias=False, **dd)
        self.complex_weight = nn.Parameter(torch.empty(half, size[0], size[1], 2, **dd))
        self.post_norm = LayerNorm2d(dim, eps=norm_eps, **dd)
        trunc_normal_(self.complex_weight, std=0.02)
        self._kept: _Resized | None = None

    def forward(self, x: Tensor) -> Tensor:
        """Filter a map of any size."""
        near, far = self.pre_norm(x).chunk(2, dim=1)
        near = self.dw(near)
        weight = self.complex_weight if torch.jit.is_scripting() else self._prepared(far)
        far = _filtered(far, weight, self.dft_matmul)
        return self.post_norm(torch.stack((near, far.to(near.dtype)), dim=2).flatten(1, 2))

    @torch.jit.unused
    def _prepared(self, x: Tensor) -> Tensor:
        """The filter, resized for a map where the result can be kept."""
        weight = self.complex_weight
        if not _may_be_kept(weight):
            return weight
        size, dtype = (x.shape[-2], x.shape[-1] // 2 + 1), _computed_in(x)
        if tuple(weight.shape[1:3]) == size and weight.dtype == dtype:
            return weight
        if self._kept is None or not self._kept.holds(weight, size, dtype):
            # A tensor made in inference mode could not be used in training afterwards.
            with torch.inference_mode(False), torch.no_grad():
                result = resized_filter(weight.to(dtype), *size)
            self._kept = _Resized(weight, weight._version, weight.data_ptr(), result)
        return self._kept.result

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        self._kept = None
        return super()._apply(fn, recurse)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_kept": None}


def resized_filter(weight: Tensor, rows: int, columns: int) -> Tensor:
    """A filter for maps of another size: bilinear, with the corners kept in place.

    Args:
        weight: (C, h, w, 2), the last axis real and imaginary part.
        rows: H of the maps.
        columns: W // 2 + 1 of the maps.

    Returns:
        (C, rows, columns, 2), contiguous.
    """
    if weight.shape[1] == rows and weight.shape[2] == columns:
        return weight.contiguous()
    parts = F.interpolate(weight.permute(3, 0, 1, 2), size=[rows, columns], mode="bilinear", align_corners=True)
    return parts.permute(1, 2, 3, 0).contiguous()


@dataclasses.dataclass(frozen=True, eq=False)
class _Resized:
    """A resized filter and the state of the parameter that it was made from."""

    weight: Tensor
    version: int
    address: int
    result: Tensor

    def holds(self, weight: Tensor, size: tuple[int, int], dtype: torch.dtype) -> bool:
        """Whether this is the filter of ``weight`` for maps of this size and type."""
        unchanged = self.weight is weight and self.version == weight._version and self.address == weight.data_ptr()
        return unchanged and tuple(self.result.shape[1:3]) == size and self.result.dtype == dtype


def _may_be_kept(weight: Tensor) -> bool:
    """Whether changes of a frozen parameter can be seen, and nobody is recording what is computed from it."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return False
    return type(weight) is nn.Parameter and not (weight.requires_grad or weight.is_inference())


def _computed_in(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


@torch.fx.wrap  # it looks at sizes, which FX cannot follow
def _filtered(x: Tensor, weight: Tensor, dft_matmul: bool) -> Tensor:
    """Filter x (B, C, H, W) of any type with a weight (C, h, w, 2) of any type and size."""
    dtype = _computed_in(x)
    x, weight = x.to(dtype), resized_filter(weight.to(dtype), x.shape[-2], x.shape[-1] // 2 + 1)
    if not dft_matmul:
        return _by_fft(x, weight)
    if torch.jit.is_scripting() or x.device.type == "meta":
        return _by_matrices(x, weight)
    with torch.autocast(x.device.type, enabled=False):
        return _by_matrices(x, weight)


def _by_fft(x: Tensor, weight: Tensor) -> Tensor:
    """Filter x (B, C, H, W) with a weight (C, H, W // 2 + 1, 2)."""
    spectrum = torch.fft.rfft2(x, norm="ortho") * torch.view_as_complex(weight)
    return torch.fft.irfft2(spectrum, s=[x.shape[-2], x.shape[-1]], norm="ortho")


def _by_matrices(x: Tensor, weight: Tensor) -> Tensor:
    """What :func:`_by_fft` returns, from real matrix products alone.

    The weight need not be the transform of a real map. What the inverse transform makes of it then is that of the FFT:
    complex along H; along W the real part of the sum over all columns, in which the inner columns stand for two.
    """
    height, width = x.shape[-2], x.shape[-1]
    columns = width // 2 + 1
    cos_h, sin_h = _waves(height, height, x)
    cos_w, sin_w = _waves(width, columns, x)
    real, imag = x @ cos_w, -(x @ sin_w)
    real, imag = cos_h @ real + sin_h @ imag, cos_h @ imag - sin_h @ real
    a, b = weight[..., 0], weight[..., 1]
    real, imag = a * real - b * imag, a * imag + b * real
    real, imag = cos_h @ real - sin_h @ imag, cos_h @ imag + sin_h @ real
    alone = 2 * torch.arange(columns, device=x.device) % width == 0  # the first column, and the last of an even width
    times = 2 - alone.to(x.dtype)
    return (real * times) @ cos_w.t() - (imag * times) @ sin_w.t()


def _waves(size: int, count: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """Cosine and sine of 2 pi j k / size for j < size and k < count, (size, count), over sqrt(size)."""
    rows, columns = torch.arange(size, device=like.device), torch.arange(count, device=like.device)
    # The period is taken off while the numbers are whole, where it costs no digits.
    angles = (rows.unsqueeze(1) * columns % size).to(like.dtype) * (2 * math.pi / size)
    return angles.cos() / math.sqrt(size), angles.sin() / math.sqrt(size)
