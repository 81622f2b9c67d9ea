"""The dry run: which modules of a model are really called, how often, and with what shapes.

Hooks are used here and only here, read-only, and are gone when the run ends.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from .graft import RESERVED, first_tensor
from .layers import is_conv

Example = tuple[tuple[Any, ...], dict[str, Any]]


@dataclasses.dataclass
class Call:
    """What one module did in the dry run.

    Attributes:
        count: How many times it was called.
        order: Position in the order of first calls.
        input: Shape of its first tensor argument, None when it has none.
        output: Shape of its first tensor output, None when it has none.
    """

    count: int
    order: int
    input: tuple[int, ...] | None
    output: tuple[int, ...] | None


@dataclasses.dataclass(frozen=True)
class Trace:
    """The dry run's record: path -> call, and the shape of the model's own output."""

    calls: dict[str, Call]
    input: tuple[int, ...] | None

    def fired(self, path: str) -> bool:
        """Whether the module at ``path`` was called."""
        return path in self.calls


def trace(model: nn.Module, example: Example) -> Trace:
    """Run ``model`` once, in eval mode and without gradients, and record every call.

    Args:
        model: Any module; its mode, buffers and hooks are what they were when this returns.
        example: Positional and keyword arguments.
    """
    calls: dict[str, Call] = {}
    handles = []

    def watch(path: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
            if path in calls:
                calls[path].count += 1
            else:
                calls[path] = Call(1, len(calls), _shape_in(args, kwargs), _shape_out(out))

        return hook

    with in_eval_mode(model), torch.no_grad():
        try:
            for path, module in model.named_modules():
                if RESERVED not in path.split("."):
                    handles.append(module.register_forward_hook(watch(path), with_kwargs=True))
            model(*example[0], **example[1])
        finally:
            for handle in handles:
                handle.remove()
    return Trace(calls, _shape_in(*example))


def dry_run(model: nn.Module, example: Example | None = None, size: int | None = None) -> Trace | None:
    """Trace ``model`` on ``example`` or on the first guess it accepts; None when it accepts none."""
    if example is not None:
        return trace(model, example)
    for guess in guesses(model, size):
        with contextlib.suppress(Exception):
            return trace(model, guess)
    return None


def guesses(model: nn.Module, size: int | None = None) -> Iterator[Example]:
    """Plausible inputs of batch size 1, most likely first.

    The model's own configuration (timm, torchvision, transformers) comes first, then what its first layer
    reads. ``size`` fixes the side of the image.
    """
    reference = next((p for p in model.parameters()), torch.empty(0))
    like = {"device": reference.device, "dtype": reference.dtype if reference.is_floating_point() else None}
    config = getattr(model, "config", None)
    main = getattr(model, "main_input_name", None)
    if config is not None and isinstance(main, str):
        yield from _transformers_guesses(config, main, size, like)
        return
    first = _first_layer(model)
    if isinstance(first, nn.Embedding):
        yield (torch.zeros(1, 8, dtype=torch.long, device=like["device"]),), {}
        return
    if isinstance(first, nn.Linear):
        for shape in ((1, first.in_features), (1, 4, first.in_features), (1, 4, 4, first.in_features)):
            yield (torch.zeros(shape, **like),), {}
    dims, channels = (len(first.kernel_size), first.in_channels) if is_conv(first) else (2, 3)  # type: ignore[arg-type, union-attr]
    for side in [size] if size else _sides(model, dims):
        space = side if isinstance(side, tuple) else (side,) * dims
        yield (torch.zeros(1, channels, *space, **like),), {}


def image_size(model: nn.Module) -> tuple[int, int] | None:
    """The image size that the model's own configuration names, (H, W)."""
    embed = getattr(model, "patch_embed", None)
    for found in (getattr(embed, "img_size", None), getattr(model, "image_size", None)):
        if isinstance(found, int):
            return found, found
        if isinstance(found, (tuple, list)) and len(found) == 2:
            return int(found[0]), int(found[1])
    config = getattr(model, "pretrained_cfg", None) or getattr(model, "default_cfg", None)
    if isinstance(config, dict) and config.get("input_size"):
        _, h, w = config["input_size"]
        return h, w
    found = getattr(getattr(model, "config", None), "image_size", None)
    return (found, found) if isinstance(found, int) else None


@contextlib.contextmanager
def in_eval_mode(model: nn.Module) -> Iterator[None]:
    """Eval mode for the whole model; every module gets its own flag back."""
    flags = [(m, m.training) for m in model.modules()]
    try:
        for module, _ in flags:
            module.training = False
        yield
    finally:
        for module, flag in flags:
            module.training = flag


def _sides(model: nn.Module, dims: int) -> list[Any]:
    known = image_size(model) if dims == 2 else None
    inner = next((image_size(m) for m in model.children() if image_size(m)), None) if dims == 2 else None
    common = {1: [64, 128, 1024], 2: [64, 32, 28, 224, 256, 96, 16, 384, 8], 3: [(8, 32, 32), 16, (16, 112, 112), 8]}
    return [s for s in (known, inner) if s] + list(common[dims])


def _transformers_guesses(config: Any, main: str, size: int | None, like: dict[str, Any]) -> Iterator[Example]:
    if main == "pixel_values":
        side = size or getattr(config, "image_size", None) or 224
        side = side if isinstance(side, (tuple, list)) else (side, side)
        yield (), {main: torch.zeros(1, getattr(config, "num_channels", 3), *side, **like)}
        return
    ids = torch.ones(1, 8, dtype=torch.long, device=like["device"])
    yield (), {main: ids}
    yield (), {main: ids, "decoder_input_ids": ids}


def _first_layer(model: nn.Module) -> nn.Module | None:
    for module in model.modules():
        if is_conv(module) or isinstance(module, (nn.Linear, nn.Embedding)):
            return module
    return None


def _shape_in(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[int, ...] | None:
    try:
        return tuple(first_tensor(args, kwargs).shape)
    except TypeError:
        return None


def _shape_out(out: Any) -> tuple[int, ...] | None:
    while not isinstance(out, Tensor):
        if isinstance(out, dict) and out:
            out = next(iter(out.values()))
        elif isinstance(out, (tuple, list)) and out:
            out = out[0]
        else:
            return None
    return tuple(out.shape)
