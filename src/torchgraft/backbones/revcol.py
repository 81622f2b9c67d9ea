"""RevCol: a small four-level ConvNeXt run N times over, each level adding to what it was the time before.

"Reversible Column Networks", arXiv:2212.11696 (ICLR 2023). The image is embedded once, x = stem(image) of stride 4;
then N columns compute maps c0, c1, c2, c3 of strides 4, 8, 16, 32 in this order (c': the column before):

    c0 = alpha0 c0' + F0(x, c1')        F_l(lower, upper) = blocks(downsample(lower) + up(upper))
    c1 = alpha1 c1' + F1(c0, c2')       downsample: 2x2 convolution, LayerNorm (level 0: nothing)
    c2 = alpha2 c2' + F2(c1, c3')       up: linear, LayerNorm, nearest to the size of the lower branch
    c3 = alpha3 c3' + F3(c2)            c_l: (B, C_l, H / 2^(2+l), W / 2^(2+l)),  alpha_l: (1, C_l, 1, 1)

The first column has no c': there c = F without an up branch. Early columns carry detail, late ones meaning. As long as
no alpha is near 0 every column can be inverted, so that the backward can compute activations again in place of keeping
them (``revcol_memory``). In the huge network level 0 also reads c3' (``up2``).

Parameters (ImageNet-1K head): tiny 30,456,168, small 60,568,424, base 138,616,408, large 273,095,400, xlarge
833,807,400, huge 2,157,600,160. Published: 30, 60, 138, 273, 834 and 2158 million.
"""

# Annotations are objects here, not strings: FX hands that of an input on to TorchScript, which knows no string.
import itertools
import logging
import math
import re
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import (
    LayerNorm,
    LayerNorm2d,
    NormMlpClassifierHead,
    calculate_drop_path_rates,
    get_device_dtype,
    trunc_normal_,
)
from timm.models import build_model_with_cfg, generate_default_cfgs
from timm.models.convnext import ConvNeXtBlock
from torch import Tensor, nn

from ..errors import GraftError
from .published import Published
from .revcol_supervision import Supervised, Supervision, compound_loss
from .timm_api import FeatureGetterNet, feature_take_indices, register_backbone, untrained_cfg, unwrapped

__all__ = ["PUBLISHED", "RevCol", "checkpoint_filter_fn", "compound_loss", "official_name", "runs_with"]

_logger = logging.getLogger(__name__)
_norm = partial(LayerNorm2d, eps=1e-6)

LEVELS = 4
SMALLEST_ALPHA = 1e-3


class Upward(nn.Module):
    """A map of a higher level in the channels and the size of a lower one: (B, C, h, w) -> (B, C', H, W)."""

    def __init__(self, dim: int, out_dim: int, device: Any = None, dtype: Any = None) -> None:
        super().__init__()
        self.proj = nn.Linear(dim, out_dim, device=device, dtype=dtype)
        self.norm = LayerNorm(out_dim, eps=1e-6, device=device, dtype=dtype)

    def forward(self, x: Tensor, like: Tensor) -> Tensor:
        """``like``: a map of the wanted size, for sizes that do not halve exactly."""
        x = self.norm(self.proj(x.permute(0, 2, 3, 1))).permute(0, 3, 1, 2)
        return F.interpolate(x, size=like.shape[-2:], mode="nearest")


class Level(nn.Module):
    """One level of a column: c = alpha c' + F(lower, upper', top'), all (B, C, H, W) at the level's stride.

    Args:
        dims: Channels of the four levels.
        column: Number of its column.
        number: Its own number, 0 to 3.
        rates: Stochastic depth of its blocks, one each.
        kernel_size: Of the depthwise convolutions.
        last: Whether its column is the last.
        top_link: Whether level 0 also reads the highest level of the column before.
        zero_alpha: What an alpha of exactly 0 means: ``"clamp"`` +1e-3, ``"keep"`` 0.
        device: Where the parameters are made.
        dtype: Their type.

    Attributes:
        memory: One of :data:`torchgraft.backbones.revcol_memory.MODES`.
    """

    def __init__(
        self,
        dims: tuple[int, ...],
        column: int,
        number: int,
        rates: list[float],
        kernel_size: int = 3,
        last: bool = False,
        top_link: bool = False,
        zero_alpha: str = "clamp",
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        dim = dims[number]
        self.memory = "off"
        self.column, self.number, self.last = column, number, last
        self.keep_zero, self.smallest = zero_alpha == "keep", SMALLEST_ALPHA
        self.downsample = (
            nn.Sequential(nn.Conv2d(dims[number - 1], dim, 2, stride=2, **dd), _norm(dim, **dd))
            if number
            else nn.Identity()
        )
        self.up = Upward(dims[number + 1], dim, **dd) if column and number < LEVELS - 1 else None
        self.up2 = Upward(dims[-1], dim, **dd) if column and top_link and number == 0 else None
        self.blocks = nn.Sequential(*[ConvNeXtBlock(dim, kernel_size=kernel_size, drop_path=r, **dd) for r in rates])
        self.alpha = nn.Parameter(torch.full((1, dim, 1, 1), 0.5, **dd))

    def place(self) -> str:
        """The level's path in the network."""
        return f"columns.{self.column}.levels.{self.number}"

    def used_alpha(self) -> Tensor:
        """The alpha that acts: at least 1e-3 away from 0, on its own side; its gradient is that of ``alpha``."""
        given = self.alpha.detach()
        size = given.abs().clamp(min=self.smallest)
        used = torch.where(given < 0, -size, size)
        if self.keep_zero:
            used = torch.where(given == 0, given, used)
        return used + (self.alpha - given)

    def branch(self, lower: Tensor, upper: Tensor | None, top: Tensor | None) -> Tensor:
        """F: the part of the level that may be any function."""
        lower = self.downsample(lower)
        x = lower
        if self.up is not None and upper is not None:
            x = x + self.up(upper, lower)
        if self.up2 is not None and top is not None:
            x = x + self.up2(top, lower)
        return self.blocks(x)

    def join(self, branch: Tensor, same: Tensor | None) -> Tensor:
        """The sum with the column before."""
        if same is None:
            # Without a column before alpha has no effect, and in training, as in the published code, a gradient of 0.
            return branch + 0.0 * self.alpha if torch.is_grad_enabled() else branch
        return torch.addcmul(branch, self.used_alpha(), same)

    def compute(self, lower: Tensor, same: Tensor | None, upper: Tensor | None, top: Tensor | None) -> Tensor:
        """The level without regard to memory."""
        return self.join(self.branch(lower, upper, top), same)

    def forward(
        self, lower: Tensor, same: Tensor | None = None, upper: Tensor | None = None, top: Tensor | None = None
    ) -> Tensor:
        """The level's map, from maps of this column (``lower``) and of the one before."""
        if not torch.jit.is_scripting():
            return _memory_modes().run_level(self, lower, same, upper, top)
        return self.compute(lower, same, upper, top)


class Column(nn.Module):
    """Four levels: x (B, C0, H / 4, W / 4) and the maps of the column before -> its own maps."""

    def __init__(self, levels: list[Level]) -> None:
        super().__init__()
        self.levels = nn.ModuleList(levels)
        self.top_link = levels[0].up2 is not None

    def forward(self, x: Tensor, previous: list[Tensor], stop: int = LEVELS) -> list[Tensor]:
        """The maps of the first ``stop`` levels; ``previous`` is empty in the first column."""
        maps: list[Tensor] = []
        for i, level in enumerate(self.levels):
            if i < stop:
                top = _at(previous, 3) if self.top_link and i == 0 else None
                x = level(x, _at(previous, i), _at(previous, i + 1), top)
                maps.append(x)
        return maps


def _memory_modes() -> Any:
    """The module :mod:`.revcol_memory`, imported when it is used.

    It needs the core, which imports timm, and importing timm brings this file.
    """
    from . import revcol_memory

    return revcol_memory


def _at(maps: list[Tensor], index: int) -> Tensor | None:
    return maps[index] if index < len(maps) else None


class RevColFeatures(FeatureGetterNet):
    """timm's wrapper for ``features_only``: the maps of the last column."""

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """As the model's."""
        model: Any = self.model
        model.set_grad_checkpointing(enable)


class RevCol(nn.Module):
    """RevCol.

    Shapes: (B, in_chans, H, W) -> (B, num_classes), for any H and W of at least 32. The maps are those of the last
    column, of strides 4, 8, 16 and 32; their sizes are rounded down.

    Args:
        in_chans: Channels of the image.
        num_classes: Classes; 0: no classifier.
        global_pool: Pooling ahead of it; empty: none.
        output_stride: 32; the network has no dilated form.
        dims: Channels of the four levels.
        depths: Blocks per level, the same in every column.
        columns: Number of columns.
        kernel_size: Of the depthwise convolutions.
        top_link: Whether level 0 also reads the highest level of the column before (huge).
        memory: What is kept for the backward: ``"recompute"``, ``"off"`` or ``"reversible"``; see
            :mod:`torchgraft.backbones.revcol_memory`.
        inter_supv: Add classifiers and decoders at the columns for :meth:`forward_supervised`.
        zero_alpha: What an alpha of exactly 0 means: ``"clamp"`` +1e-3; ``"keep"`` 0, as in the published code.
        head_init_scale: Factor of the classifier's initial values.
        drop_rate: Dropout ahead of the classifier.
        drop_path_rate: Stochastic depth of a column's last block, growing linearly from 0 in each.
        device: Where the parameters are made.
        dtype: Their type.

    Raises:
        GraftError: An unknown ``memory`` or ``zero_alpha``, or a number of columns that cannot be supervised.
    """

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        output_stride: int = 32,
        dims: tuple[int, ...] = (64, 128, 256, 512),
        depths: tuple[int, ...] = (2, 2, 4, 2),
        columns: int = 4,
        kernel_size: int = 3,
        top_link: bool = False,
        memory: str = "recompute",
        inter_supv: bool = False,
        zero_alpha: str = "clamp",
        head_init_scale: float = 1.0,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        assert output_stride == 32, "RevCol has no dilated form: output_stride must be 32."
        dd = {"device": device, "dtype": dtype}
        dims, depths = tuple(dims), tuple(depths)
        _check(dims, depths, columns, zero_alpha)
        self.num_classes, self.in_chans, self.drop_rate = num_classes, in_chans, drop_rate

        self.stem = nn.Sequential(nn.Conv2d(in_chans, dims[0], 4, stride=4, **dd), _norm(dims[0], **dd))
        rates: Any = calculate_drop_path_rates(drop_path_rate, list(depths), stagewise=True)

        def level(column: int, number: int) -> Level:
            last = column == columns - 1
            return Level(dims, column, number, rates[number], kernel_size, last, top_link, zero_alpha, **dd)

        self.columns = nn.ModuleList(Column([level(i, j) for j in range(LEVELS)]) for i in range(columns))
        self.feature_info = [
            {"num_chs": dim, "reduction": 2 ** (j + 2), "module": f"columns.{columns - 1}.levels.{j}"}
            for j, dim in enumerate(dims)
        ]
        self.num_levels = LEVELS
        self.num_features = dims[-1]
        self.head = NormMlpClassifierHead(
            self.num_features, num_classes, pool_type=global_pool, drop_rate=drop_rate, norm_layer=_norm, **dd
        )
        self.head_hidden_size = self.head.num_features
        self.supervision = Supervision(dims, columns, num_classes, in_chans, **dd) if inter_supv else None
        self.apply(_init_weights)
        if num_classes > 0 and head_init_scale != 1.0:
            self._scale_heads(head_init_scale)
        self._alphas = _memory_modes().AlphaWatch()
        self.set_memory_mode(memory)

    def _scale_heads(self, factor: float) -> None:
        heads = [self.head, *(self.supervision.heads if self.supervision is not None else ())]
        with torch.no_grad():
            for parameter in (p for head in heads for p in head.fc.parameters()):
                parameter.mul_(factor)

    @torch.jit.ignore
    def set_memory_mode(self, mode: str) -> None:
        """Choose what is kept for the backward.

        Args:
            mode: ``"off"``, ``"recompute"`` or ``"reversible"``.

        Raises:
            GraftError: There is no such mode. Whether ``"reversible"`` is accurate enough is looked at in the next
                forward that autograd records, and whenever an alpha has changed.
        """
        self.memory = _memory_modes().check_mode(mode)
        grid = self.grid()
        for level in itertools.chain(*grid):
            level.memory = mode
        if mode == "reversible" and not grid[0][0].alpha.is_meta:
            _logger.info("reversible: min|alpha| = %.3g", _memory_modes().smallest_alpha(grid))

    @torch.jit.ignore
    def grid(self) -> list[list[Level]]:
        """The levels of every column."""
        columns: Any = self.columns
        return [list(column.levels) for column in columns]

    @property
    def grad_checkpointing(self) -> bool:
        """Whether activations are computed again in the backward."""
        return self.memory != "off"

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Memory mode ``"recompute"`` unless one that saves memory is on already; with False ``"off"``."""
        if enable is not self.grad_checkpointing:
            self.set_memory_mode("recompute" if enable else "off")

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Parameter groups from the input to the output.

        Per column, or, as in the published layer-wise decay, by the shortest way through the grid of blocks: block b
        of column i, counted through its levels, has depth b + i.
        """
        if coarse:
            return {"stem": r"^stem", "blocks": r"^columns\.(\d+)"}
        by_depth: dict[int, list[str]] = {}
        for i, levels in enumerate(self.grid()):
            by_depth.setdefault(i, []).append(rf"columns\.{i}\.levels\.\d+\.alpha")
            first = 0
            for j, level in enumerate(levels):
                here = rf"columns\.{i}\.levels\.{j}"
                by_depth.setdefault(i + first, []).append(rf"{here}\.(?:downsample|up2?)\.")
                for b in range(len(level.blocks)):
                    by_depth.setdefault(i + first + b, []).append(rf"{here}\.blocks\.{b}\.")
                first += len(level.blocks)
        return {"stem": r"^stem", "blocks": [(f"^(?:{'|'.join(by_depth[d])})", (d,)) for d in sorted(by_depth)]}

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """The alphas of the first column, which have no effect."""
        return {f"{level.place()}.alpha" for level in self.grid()[0]}

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        """The linear layer (``nn.Identity`` without classes)."""
        return self.head.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None, reset_other: bool = False) -> None:
        """Make a new classifier, without supervision of the columns; ``global_pool=None`` keeps the pooling.

        Args:
            num_classes: Classes; 0: none.
            global_pool: Pooling.
            reset_other: Take the head's norm out, too.
        """
        self.num_classes = num_classes
        dd = get_device_dtype(self)
        self.head.reset(num_classes, global_pool, reset_other=reset_other, in_features=self.num_features, **dd)
        self.head_hidden_size = self.head.num_features
        self.supervision = None

    def forward_maps(self, x: Tensor, stop: int = LEVELS) -> list[Tensor]:
        """Images (B, in_chans, H, W) -> the maps of the last column, or its first ``stop``."""
        x = self.stem(x)
        if not torch.jit.is_scripting():
            self._alphas.look(self, x)
        maps: list[Tensor] = []
        for i, column in enumerate(self.columns):
            maps = column(x, maps, stop) if i == len(self.columns) - 1 else column(x, maps)
        return maps

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """The maps of the last column.

        Args:
            x: Images (B, in_chans, H, W).
            indices: Which maps: the last so many, a list, or all.
            norm: Of no effect: the network has no final norm.
            stop_early: Leave out the levels of the last column above the last map that is asked for. In memory mode
                ``"reversible"`` they are needed and stay.
            output_fmt: ``"NCHW"``.
            intermediates_only: Return the maps alone.

        Returns:
            The maps, or the output of :meth:`forward_features` and the maps.
        """
        assert output_fmt == "NCHW", "Output shape must be NCHW."
        take_indices, max_index = feature_take_indices(self.num_levels, indices)
        stop = max_index + 1 if stop_early and self.memory != "reversible" else self.num_levels
        maps = self.forward_maps(x, stop)
        intermediates: list[Tensor] = []
        for i, found in enumerate(maps):
            if i in take_indices:
                intermediates.append(found)
        if intermediates_only:
            return intermediates
        return maps[-1], intermediates

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop the levels that no map that is asked for depends on, and the head; returns the maps' indices."""
        take_indices, needed = feature_take_indices(self.num_levels, indices)
        shorter = needed < self.num_levels - 1
        self.num_features = self.feature_info[needed]["num_chs"]
        self.num_levels = needed + 1
        columns: Any = self.columns
        for column in reversed(columns):
            column.levels = column.levels[: needed + 1]
            needed = LEVELS - 1 if column.top_link else min(needed + 1, LEVELS - 1)
        if prune_head or shorter:
            self.reset_classifier(0, "", reset_other=True)
        return take_indices

    def forward_features(self, x: Tensor) -> Tensor:
        """Images (B, in_chans, H, W) -> map (B, num_features, H // 32, W // 32)."""
        return self.forward_maps(x)[-1]

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """The map -> (B, num_classes); with ``pre_logits`` (B, head_hidden_size)."""
        return self.head(x, pre_logits=True) if pre_logits else self.head(x)

    def forward(self, x: Tensor) -> Tensor:
        """Images (B, in_chans, H, W) -> (B, num_classes)."""
        return self.forward_head(self.forward_features(x))

    @torch.jit.ignore
    def forward_supervised(self, x: Tensor) -> Supervised:
        """Logits and rebuilt images of the supervised columns, for :func:`compound_loss`.

        Args:
            x: Images (B, in_chans, H, W), H and W multiples of 32.

        Raises:
            GraftError: The network was built without ``inter_supv=True``, or its classifier is a new one.
        """
        if self.supervision is None:
            raise GraftError("revcol: forward_supervised needs a network with inter_supv=True")
        x = self.stem(x)
        self._alphas.look(self, x)
        maps: list[Tensor] = []
        found = Supervised([], [])
        for i, column in enumerate(self.columns):
            maps = column(x, maps)
            place = self.supervision.place(i)
            if place is not None:
                logits, image = self.supervision(maps[-1], place)
                found.logits.append(logits)
                found.images.append(image)
        found.logits.append(self.forward_head(maps[-1]))
        return found


def _check(dims: tuple[int, ...], depths: tuple[int, ...], columns: int, zero_alpha: str) -> None:
    if len(dims) != LEVELS or len(depths) != LEVELS or columns < 1:
        raise GraftError(
            f"revcol: expected {LEVELS} dims, {LEVELS} depths and at least one column, "
            f"not dims={dims}, depths={depths}, columns={columns}"
        )
    if zero_alpha not in ("clamp", "keep"):
        raise GraftError(f"revcol: zero_alpha={zero_alpha!r}; expected 'clamp' or 'keep'")


def _init_weights(module: nn.Module) -> None:
    if isinstance(module, (nn.Conv2d, nn.Linear)):
        trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def runs_with() -> str:
    """The memory mode that networks are built with."""
    return "memory: recompute"


_OFFICIAL = (
    (r"^subnet(\d+)\.level(\d)\.", r"columns.\1.levels.\2."),
    (r"^subnet(\d+)\.alpha(\d)$", r"columns.\1.levels.\2.alpha"),
    (r"\.fusion\.down\.", ".downsample."),
    (r"\.fusion\.(up2?)\.channel_reschedule\.0\.", r".\1.proj."),
    (r"\.fusion\.(up2?)\.channel_reschedule\.1\.", r".\1.norm."),
    (r"^decoder_blocks\.(\d)\.projback\.", r"supervision.decoders.\1.out."),
    (r"^decoder_blocks\.(\d)\.proj_layers\.(\d)\.0\.", r"supervision.decoders.\1.steps.\2.proj."),
    (r"^decoder_blocks\.(\d)\.proj_layers\.(\d)\.1\.", r"supervision.decoders.\1.steps.\2.norm."),
    (r"^decoder_blocks\.(\d)\.normal_layers\.(\d)\.0\.", r"supervision.decoders.\1.steps.\2.block."),
    (r"\.dwconv\.", ".conv_dw."),
    (r"\.pwconv([12])\.", r".mlp.fc\1."),
    (r"^cls_blocks\.3\.", "cls."),
    (r"^cls_blocks\.(\d)\.", r"supervision.heads.\1."),
    (r"^cls\.", "head."),
    (r"\.classifier\.0\.", ".norm."),
    (r"^(head|supervision\.heads\.\d)\.classifier\.1\.", r"\1.fc."),
)


def official_name(key: str) -> str | None:
    """Our key for one of the published code."""
    for pattern, ours in _OFFICIAL:
        key = re.sub(pattern, ours, key)
    return key


def checkpoint_filter_fn(state_dict: dict[str, Any], model: nn.Module) -> dict[str, Any]:
    """A published checkpoint or one of ours as a state dict of ``model``.

    What supervises columns is left out where the model has no place for it. Depthwise kernels that are smaller than
    the model's get a frame of zeros, as the published segmentation of the huge network has it.
    """
    state = unwrapped(state_dict)
    if "subnet0.alpha0" in state:
        later = [v.abs().min() for k, v in state.items() if re.match(r"subnet(?!0\.)\d+\.alpha", k) and not v.is_meta]
        _logger.info("the checkpoint has min|alpha| = %.3g", float(min(later, default=math.inf)))
        state = {str(official_name(key)): value for key, value in state.items()}
    ours = model.state_dict()
    fitted = {}
    for key, value in state.items():
        if key.startswith("supervision.") and (key not in ours or value.shape != ours[key].shape):
            continue
        if key.endswith(".conv_dw.weight") and key in ours:
            frame = (ours[key].shape[-1] - value.shape[-1]) // 2
            value = F.pad(value, (frame,) * 4) if frame > 0 else value
        fitted[key] = value
    return fitted


_cfg = partial(
    untrained_cfg,
    license="apache-2.0",
    paper_ids="arXiv:2212.11696",
    paper_name="Reversible Column Networks",
    origin_url="https://github.com/megvii-research/RevCol",
)


default_cfgs = generate_default_cfgs(
    {
        "revcol_tiny.in1k": _cfg(),
        "revcol_small.in1k": _cfg(),
        "revcol_base.in1k": _cfg(),
        "revcol_large.in22k_ft_in1k": _cfg(),
        "revcol_xlarge.in22k_ft_in1k": _cfg(input_size=(3, 384, 384), pool_size=(12, 12)),
        "revcol_huge.megdata168m_ft_in1k": _cfg(input_size=(3, 640, 640), pool_size=(20, 20)),
        "test_revcol.untrained": _cfg(input_size=(3, 64, 64), pool_size=(2, 2)),
        "test_revcol_huge.untrained": _cfg(input_size=(3, 64, 64), pool_size=(2, 2)),
    }
)

_DIMS = {
    "tiny": (64, 128, 256, 512),
    "base": (72, 144, 288, 576),
    "large": (128, 256, 512, 1024),
    "xlarge": (224, 448, 896, 1792),
    "huge": (360, 720, 1440, 2880),
}

PUBLISHED: dict[str, Published] = {
    "revcol_tiny": Published(30_456_168, 4.517, _DIMS["tiny"], top1=82.2),
    "revcol_small": Published(60_568_424, 9.044, _DIMS["tiny"], top1=83.5),
    "revcol_base": Published(138_616_408, 16.585, _DIMS["base"], top1=84.1),
    "revcol_large": Published(273_095_400, 39.306, _DIMS["large"], top1=86.6, data="ImageNet-22K"),
    "revcol_xlarge": Published(833_807_400, 353.26, _DIMS["xlarge"], top1=88.2, side=384, data="ImageNet-22K"),
    "revcol_huge": Published(2_157_600_160, 2535.6, _DIMS["huge"], top1=90.0, side=640, data="Megdata-168M"),
}


def _create(variant: str, pretrained: bool, **kwargs: Any) -> RevCol:
    return build_model_with_cfg(
        RevCol,
        variant,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg={"out_indices": (0, 1, 2, 3), "feature_cls": RevColFeatures},
        **kwargs,
    )


@register_backbone
def revcol_tiny(pretrained: bool = False, **kwargs: Any) -> RevCol:
    """RevCol-T: 4 columns, 30 million parameters, 4.5 GMACs."""
    return _create("revcol_tiny", pretrained, **{"dims": _DIMS["tiny"], **kwargs})


@register_backbone
def revcol_small(pretrained: bool = False, **kwargs: Any) -> RevCol:
    """RevCol-S: 8 columns, 60 million parameters, 9.0 GMACs."""
    return _create("revcol_small", pretrained, **{"dims": _DIMS["tiny"], "columns": 8, **kwargs})


@register_backbone
def revcol_base(pretrained: bool = False, **kwargs: Any) -> RevCol:
    """RevCol-B: 16 columns, 138 million parameters, 16.6 GMACs."""
    size = {"dims": _DIMS["base"], "depths": (1, 1, 3, 2), "columns": 16}
    return _create("revcol_base", pretrained, **{**size, **kwargs})


@register_backbone
def revcol_large(pretrained: bool = False, **kwargs: Any) -> RevCol:
    """RevCol-L: 8 columns, 273 million parameters, 39 GMACs."""
    size = {"dims": _DIMS["large"], "depths": (1, 2, 6, 2), "columns": 8}
    return _create("revcol_large", pretrained, **{**size, **kwargs})


@register_backbone
def revcol_xlarge(pretrained: bool = False, **kwargs: Any) -> RevCol:
    """RevCol-XL: 8 columns, 834 million parameters, 353 GMACs at 384 pixels."""
    size = {"dims": _DIMS["xlarge"], "depths": (1, 2, 6, 2), "columns": 8}
    return _create("revcol_xlarge", pretrained, **{**size, **kwargs})


@register_backbone
def revcol_huge(pretrained: bool = False, **kwargs: Any) -> RevCol:
    """RevCol-H: 8 columns with a link from the highest level, 2.2 billion parameters, 2536 GMACs at 640 pixels."""
    size = {"dims": _DIMS["huge"], "depths": (1, 2, 6, 2), "columns": 8, "top_link": True}
    return _create("revcol_huge", pretrained, **{**size, **kwargs})


@register_backbone
def test_revcol(pretrained: bool = False, **kwargs: Any) -> RevCol:
    """A very small one for tests, of two columns."""
    size = {"dims": (8, 16, 24, 32), "depths": (1, 1, 2, 1), "columns": 2}
    return _create("test_revcol", pretrained, **{**size, **kwargs})


@register_backbone
def test_revcol_huge(pretrained: bool = False, **kwargs: Any) -> RevCol:
    """A very small one for tests, with a link from the highest level to the lowest."""
    size = {"dims": (8, 12, 16, 24), "depths": (1, 1, 1, 1), "columns": 2, "top_link": True}
    return _create("test_revcol_huge", pretrained, **{**size, **kwargs})
