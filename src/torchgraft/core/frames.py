"""Frames: a clip runs through an image model as T rows of the batch; this tells the model's forms how many.

A clip (B, 3, T, H, W) becomes B*T images, row ``b*T + t``. The frozen layers do not notice. Forms that look across
frames (:class:`MixesFrames`) have to know T: from the :class:`VideoWrapper` whose call they run in, else from their
own option. There is no global state: the wrapper tells the modules of its own model, for the length of one call.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any, Literal

from torch import Tensor, nn

from ..errors import GraftError
from ..swap import swap
from .anatomy import Anatomy
from .graft import recomputing


class MixesFrames(nn.Module):
    """A form that mixes the frames of a clip; its batch is B*T images, row ``b*T + t``.

    Args:
        frames: T where no :class:`VideoWrapper` tells it.
    """

    def __init__(self, frames: int = 1) -> None:
        super().__init__()
        self.frames = frames
        self.told: int | None = None
        self._last = frames

    def clip_length(self, rows: int) -> int:
        """T of a batch of ``rows`` images. One image alone is a clip of one frame.

        Raises:
            GraftError: T does not divide the batch.
        """
        if recomputing():
            # Gradient checkpointing runs the forward again in the backward, when the wrapper's call is over.
            return self._last
        frames = self.told or (1 if rows == 1 else self.frames)
        if rows % frames:
            raise GraftError(
                f"a batch of {rows} images is no whole number of clips of {frames} frames; give B * {frames} images, "
                "clip by clip, or call the model through VideoWrapper(model) with clips (B, 3, T, H, W)"
            )
        self._last = frames
        return frames


class AveragesFrames:
    """In front of a final norm: its input becomes the mean over the frames of every clip."""

    swap_rank = -2
    told: int | None = None

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """(B*T, ...) -> the norm of (B, ...) inside a wrapper's call, the norm as it is outside."""
        x = x if self.told is None else _mean(x, self.told)
        return super().forward(x, *args, **kwargs)  # type: ignore[misc]


class VideoWrapper(nn.Module):
    """An image model that takes clips: (B, 3, T, H, W) -> what the model returns, one row per clip.

    Adapters are attached to the model itself, before or after it is wrapped; ``route`` takes one name per clip.

    Args:
        model: The image model. With ``average="norm"`` its final norm gets a generated subclass, which does
            nothing outside the wrapper's calls.
        frames: T. Needed for clips that come folded, as (B*T, 3, H, W); clips with a time axis may then have no
            other T. None: every clip says its own.
        average: Where the frames of a clip are averaged. ``"output"``: what the model returns (the logits);
            ``"norm"``: in front of the final norm, as ST-Adapter's published head does, which also lets routed
            adapters have heads of different sizes.

    Raises:
        GraftError: ``frames`` is no number of frames, or ``average="norm"`` and the model has no final norm.
    """

    def __init__(
        self, model: nn.Module, frames: int | None = None, *, average: Literal["output", "norm"] = "output"
    ) -> None:
        super().__init__()
        if frames is not None and (isinstance(frames, bool) or not isinstance(frames, int) or frames < 1):
            raise GraftError(f"VideoWrapper: frames={frames!r}; expected a whole number of at least 1, or None")
        if average not in ("output", "norm"):
            raise GraftError(f"VideoWrapper: average={average!r}; expected 'output' or 'norm'")
        self.model, self.frames, self.average = model, frames, average
        if average == "norm":
            swap(_final_norm(model), AveragesFrames)

    def forward(self, video: Tensor) -> Any:
        """Run a batch of clips.

        Args:
            video: (B, 3, T, H, W), or with ``frames`` given (B*T, 3, H, W).

        Raises:
            GraftError: Another shape, another T than ``frames``, or a routed batch without one name per clip.
        """
        images, frames = self._folded(video)
        router = self.model.__dict__.get("_torchgraft_router")
        clips = images.shape[0] // frames
        if router is not None and len(router.names) != clips:
            raise GraftError(f"VideoWrapper: {clips} clips and {len(router.names)} names; give one name per clip")
        with self._telling(frames):
            out = self.model(images)
        if self.average == "norm":
            return out
        if router is not None and isinstance(out, list):
            raise GraftError(
                "VideoWrapper: the routed adapters have heads of different sizes, whose logits cannot be averaged row "
                "by row; wrap the model with average='norm'"
            )
        return _averaged(out, frames)

    def _folded(self, video: Tensor) -> tuple[Tensor, int]:
        shape = tuple(video.shape)
        if video.dim() == 5 and self.frames in (None, shape[2]):
            return video.transpose(1, 2).flatten(0, 1), shape[2]
        if video.dim() == 4 and self.frames is not None and shape[0] % self.frames == 0:
            return video, self.frames
        expected = "(B, 3, T, H, W)"
        if self.frames is not None:
            expected = f"(B, 3, {self.frames}, H, W) or (B*{self.frames}, 3, H, W)"
        raise GraftError(f"VideoWrapper: got clips of shape {shape}; expected {expected}")

    @contextlib.contextmanager
    def _telling(self, frames: int) -> Iterator[None]:
        wanted = (MixesFrames, AveragesFrames) if self.average == "norm" else MixesFrames
        listening: list[Any] = [m for m in self.model.modules() if isinstance(m, wanted)]
        for module in listening:
            module.told = frames
        try:
            yield
        finally:
            for module in listening:
                module.told = None


def _final_norm(model: nn.Module) -> nn.Module:
    """The last norm behind the blocks."""
    anatomy = Anatomy(model)
    if anatomy.trace is not None:
        order = {path: call.order for path, call in anatomy.trace.calls.items() if call.count == 1}
        end = max((order.get(b.path, -1) for b in anatomy.blocks), default=-1)
        norms = [s.path for s in anatomy.find("norm") if s.block is None and order.get(s.path, -1) > end]
        if norms:
            return anatomy.module(max(norms, key=order.__getitem__))
    raise GraftError(
        f"VideoWrapper: {type(model).__name__} has no norm behind its blocks; use average='output', which takes the "
        "mean of what the model returns"
    )


def _averaged(out: Any, frames: int) -> Any:
    """The mean over the frames of every tensor in what a model returned."""
    if isinstance(out, Tensor):
        return _mean(out, frames)
    if isinstance(out, Mapping):
        kind: Any = type(out)
        return kind({key: _averaged(value, frames) for key, value in out.items()})
    if isinstance(out, (tuple, list)):
        return type(out)(_averaged(value, frames) for value in out)
    return out


def _mean(x: Tensor, frames: int) -> Tensor:
    return x.unflatten(0, (-1, frames)).mean(1)
