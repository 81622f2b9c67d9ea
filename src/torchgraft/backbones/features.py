"""A backbone as a pyramid of maps, for detection and segmentation.

Feature maps from high to low resolution, each with its channels and stride, from any network: through timm's
``forward_intermediates`` where there is one, else from the blocks that the anatomy finds. Two things that timm's
``features_only`` lacks are here: a layer norm on every map, as the dense versions of ConvNeXt and HorNet have it (the
map without the norm goes on to the next stage), and GhostNet's taps at the last block of each level.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

from timm.layers import LayerNorm2d
from torch import Tensor, nn

from ..errors import GraftError
from .pretrained import create_backbone
from .provenance import note_origin
from .taps import correct_taps
from .timm_api import FeatureGetterNet, tap_infos, unwrapped
from .weights_file import converted, file_origin, read_weights, state_difference

OutputNorm = Literal["auto", "layernorm2d"]

_NORMED = ("ConvNeXt", "HorNet")
"""Classes whose dense versions were published with a norm on every output."""
_OUTPUT_NORM = re.compile(r"^norm(\d)\.(weight|bias)$")
_EPSILON = 1e-6
_BACKBONE, _NORMS = "backbone.model.", "norms."
"""Where the network and the norms stand in a provider."""


class FeatureProvider(nn.Module):
    """A backbone that returns a list of maps.

    Adapters are attached to the whole or to ``backbone``; an adapter of a classifier loads into either.

    Args:
        backbone: Images (B, C, H, W) to a list of maps; the network itself is its child ``model``.
        channels: Channels of the maps.
        strides: Their strides, rising.
        normed: Whether every map goes through a layer norm over its channels, which starts as one that leaves
            normalised maps as they are and is no part of the frozen backbone.

    Attributes:
        channels: As given, like ``strides`` and ``normed``.
        norms: One module per map: a layer norm, or nothing.
    """

    def __init__(
        self, backbone: nn.Module, channels: Sequence[int], strides: Sequence[int], *, normed: bool = False
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.channels, self.strides = tuple(channels), tuple(strides)
        self.normed = normed
        self.norms = nn.ModuleList(
            LayerNorm2d(width, eps=_EPSILON) if normed else nn.Identity() for width in self.channels
        )

    def forward(self, x: Tensor) -> list[Tensor]:
        """Images (B, C, H, W) to maps (B, ``channels[i]``, H / ``strides[i]``, W / ``strides[i]``)."""
        return [norm(found) for norm, found in zip(self.norms, self.backbone(x), strict=True)]


def create_features(
    name: str,
    *,
    weights: str | Path | None = None,
    pretrained: bool = True,
    strides: Iterable[int] | None = None,
    out_norm: OutputNorm | None = "auto",
    taps: Literal["last", "timm"] = "last",
    **kwargs: Any,
) -> FeatureProvider:
    """Build a backbone that returns maps from high to low resolution, in eval mode.

    Args:
        name: A name of :func:`torchgraft.backbones.create_backbone`.
        weights: A file of a classifier, or of the backbone of a published detector or segmentor: its output norms
            (``norm0`` and on) are read too.
        pretrained: False starts from random weights.
        strides: Which maps; default: all from stride 4 on.
        out_norm: ``"layernorm2d"`` puts a layer norm on every map, None does not, ``"auto"`` does on architectures
            that were published so.
        taps: ``"last"`` takes every map behind the last block of its level; ``"timm"`` takes GhostNet's behind the
            first block, as timm does.
        **kwargs: For the model's constructor.

    Raises:
        GraftError: The network gives no maps, a stride is not among them, or the weights do not fit.
    """
    if out_norm not in ("auto", "layernorm2d", None):
        raise GraftError(f"out_norm={out_norm!r}: expected 'auto', 'layernorm2d' or None")
    if taps not in ("last", "timm"):
        raise GraftError(f"taps={taps!r}: expected 'last' or 'timm'")
    model = create_backbone(name, pretrained=pretrained and weights is None, **kwargs)
    if taps == "last":
        correct_taps(model)
    whole = set(model.state_dict())
    normed = out_norm == "layernorm2d" or (out_norm == "auto" and type(model).__name__ in _NORMED)
    provider = _provider(name, model, strides, normed).eval()
    if weights is not None:
        _load(provider, whole, Path(weights))
    return provider


def _provider(name: str, model: nn.Module, strides: Iterable[int] | None, normed: bool) -> FeatureProvider:
    if hasattr(model, "forward_intermediates"):
        found = [tap["reduction"] for tap in tap_infos(model)]
        backbone = FeatureGetterNet(model, tuple(_indices(name, found, strides)))
        info: Any = backbone.feature_info
        return FeatureProvider(backbone, info.channels(), info.reduction(), normed=normed)
    # Imported when needed: the core imports timm, whose import brings this package.
    from .map_taps import MapTaps, find_taps

    taps = find_taps(model, name)
    taps = [taps[index] for index in _indices(name, [tap.stride for tap in taps], strides)]
    return FeatureProvider(MapTaps(model, taps), [t.channels for t in taps], [t.stride for t in taps], normed=normed)


def _indices(name: str, found: list[int], strides: Iterable[int] | None) -> list[int]:
    """The last tap of every wanted stride."""
    last = {stride: index for index, stride in enumerate(found)}
    wanted = sorted(strides if strides is not None else (s for s in last if s >= 4))
    missing = [s for s in wanted if s not in last]
    if missing or not wanted:
        raise GraftError(f"strides={missing or wanted}: {name} has maps of the strides {sorted(last)}")
    return [last[stride] for stride in wanted]


def _load(provider: FeatureProvider, whole: set[str], path: Path) -> None:
    """Load a file of the whole network, or of its pyramid alone with the norms behind it.

    Args:
        provider: What is loaded into.
        whole: The names of the whole network, whose other parts the file may hold or lack.
        path: The file.
    """
    model = provider.backbone.get_submodule("model")
    state = unwrapped(read_weights(path))
    dense = {k: v for k, v in state.items() if _OUTPUT_NORM.match(k) and k not in whole}
    rest = converted({k: v for k, v in state.items() if k not in dense}, model)
    target = {f"{_BACKBONE}{k}": v for k, v in model.state_dict().items()}
    used = {f"{_BACKBONE}{k}": v for k, v in rest.items() if f"{_BACKBONE}{k}" in target or k not in whole}
    if dense and provider.normed:
        norms = provider.norms.state_dict(prefix=_NORMS)
        levels = {_level(stride): index for index, stride in enumerate(provider.strides)}
        for key, value in dense.items():
            level, _, rest_of_key = key.removeprefix("norm").partition(".")
            if int(level) in levels:
                used[f"{_NORMS}{levels[int(level)]}.{rest_of_key}"] = value
        target |= norms
    problem = state_difference(used, target)
    if problem:
        raise GraftError(f"{path} does not fit the feature maps of {type(model).__name__}: {problem}")
    provider.load_state_dict(used, strict=False)
    note_origin(model, file_origin(path))


def _level(stride: int) -> int:
    """The number that published dense models give a map: 0 at stride 4, 3 at stride 32."""
    return stride.bit_length() - 3
