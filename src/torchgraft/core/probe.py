"""The dry run: which modules of a model are really called, how often, and with what shapes.

Hooks are used here and only here, read-only, and are gone when the run ends. Nothing of the model changes:
not its mode, not its buffers, not the state of the random number generators.
"""

from __future__ import annotations

import contextlib
import dataclasses
import weakref
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..lean.fold import Pair, foldable
from .graft import RESERVED, first_tensor
from .layers import is_batchnorm, is_conv

Example = tuple[tuple[Any, ...], dict[str, Any]]

_SIDES: dict[int, list[Any]] = {
    1: [64, 128, 1024],
    2: [64, 32, 28, 224, 256, 96, 16, 384, 8],
    3: [(8, 32, 32), 16, (16, 112, 112), 8, (16, 224, 224)],
}
"""Sides of a guessed input by its number of dimensions, for models that name none."""
_DETECTOR_SIDE = 64
"""Pixels to which a detector's own transform resizes the guessed image."""


@dataclasses.dataclass
class Call:
    """What one module did in the dry run.

    Attributes:
        count: How many times it was called.
        order: Position in the order in which first calls returned: a module comes after what it holds.
        input: Shape of its first tensor argument, None when it has none.
        output: Shape of its first tensor output, None when it has none.
    """

    count: int
    order: int
    input: tuple[int, ...] | None
    output: tuple[int, ...] | None


@dataclasses.dataclass(frozen=True)
class Trace:
    """The dry run's record.

    Attributes:
        calls: Path -> call; the model itself under the empty path.
        input: Shape of the first tensor that the model was given, None when it was given none (detectors
            take a list).
        example: What the model was called with.
        read: Identities of the parameters that operations were given.
        pairs: Convolutions and the BatchNorms that were given their very output.
    """

    calls: dict[str, Call]
    input: tuple[int, ...] | None
    example: Example = ((), {})
    read: frozenset[int] = frozenset()
    pairs: tuple[Pair, ...] = ()

    def fired(self, path: str) -> bool:
        """Whether the module at ``path`` was called."""
        return path in self.calls

    def reads(self, parameter: nn.Parameter) -> bool:
        """Whether any operation of the forward was given the parameter (an unused mask token is not)."""
        return id(parameter) in self.read


class _Reads(TorchFunctionMode):
    """Notes which parameters the operations inside are given."""

    def __init__(self) -> None:
        super().__init__()
        self.ids: set[int] = set()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        for value in (*args, *kwargs.values()):
            for tensor in value if isinstance(value, (tuple, list)) else (value,):
                if isinstance(tensor, nn.Parameter):
                    self.ids.add(id(tensor))
        return func(*args, **kwargs)


def trace(model: nn.Module, example: Example) -> Trace:
    """Run ``model`` once, in eval mode and without gradients, and record every call.

    Args:
        model: Any module; its mode, buffers and hooks are what they were when this returns.
        example: Positional and keyword arguments.
    """
    calls: dict[str, Call] = {}
    made: dict[int, tuple[Any, str, nn.Module]] = {}
    pairs: list[Pair] = []
    handles = []

    def note_pair(path: str, module: nn.Module, args: tuple[Any, ...], out: Any) -> None:
        if is_conv(module) and isinstance(out, Tensor):
            made[id(out)] = weakref.ref(out), path, module
        elif is_batchnorm(module) and args and (known := made.get(id(args[0]))) is not None:
            same, conv_path, conv = known
            if same() is args[0] and foldable(conv, module):
                pairs.append(Pair(conv_path, path))

    def watch(path: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
            note_pair(path, module, args, out)
            if path in calls:
                calls[path].count += 1
            else:
                calls[path] = Call(1, len(calls), _shape_in(args, kwargs), _shape_out(out))

        return hook

    with in_eval_mode(model), torch.no_grad(), _same_random_state(model):
        try:
            for path, module in model.named_modules():
                if RESERVED not in path.split("."):
                    handles.append(module.register_forward_hook(watch(path), with_kwargs=True))
            with _Reads() as reads:
                model(*example[0], **example[1])
        finally:
            for handle in handles:
                handle.remove()
    once = tuple(p for p in pairs if calls[p.conv].count == calls[p.norm].count == 1)
    return Trace(calls, _shape_in(*example), example, frozenset(reads.ids), once)


def dry_run(model: nn.Module, example: Example | None = None, size: int | None = None) -> Trace | None:
    """Trace ``model`` on ``example`` or on the first guess it accepts; None when it accepts none."""
    if example is not None:
        return trace(model, example)
    with _small_detector(model):
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
    like: dict[str, Any] = {
        "device": reference.device,
        "dtype": reference.dtype if reference.is_floating_point() else None,
    }
    config: Any = getattr(model, "config", None)
    main = getattr(model, "main_input_name", None)
    if config is not None and isinstance(main, str):
        yield from _transformers_guesses(config, main, size, like)
        return
    if _is_detector(model):
        for channels in _channels(model):
            yield ([torch.zeros(channels, size or _DETECTOR_SIDE, size or _DETECTOR_SIDE, **like)],), {}
        return
    first = _first_layer(model)
    if isinstance(first, nn.Embedding):
        yield (torch.zeros(1, 8, dtype=torch.long, device=like["device"]),), {}
        return
    image = image_size(model)
    if isinstance(first, nn.Linear) and image is None:
        for shape in ((1, first.in_features), (1, 4, first.in_features), (1, 4, 4, first.in_features)):
            yield (torch.zeros(shape, **like),), {}
    dims = len(first.kernel_size) if is_conv(first) else 2  # type: ignore[arg-type, union-attr]
    for channels in _channels(model):
        for side in [size] if size else [*([image] if image and dims == 2 else []), *_SIDES[dims]]:
            space = side if isinstance(side, tuple) else (side,) * dims
            yield (torch.zeros(1, channels, *space, **like),), {}


def image_size(model: nn.Module) -> tuple[int, int] | None:
    """The image size that the configuration of the model, or of one of its children, names: (H, W)."""
    return next((found for m in (model, *model.children()) if (found := _own_image_size(m))), None)


def leading_tensor(out: Any) -> Tensor | None:
    """The tensor that comes first in what a model returned, however deep; None when it holds none."""
    while not isinstance(out, Tensor):
        if isinstance(out, dict) and out:
            out = next(iter(out.values()))
        elif isinstance(out, (tuple, list)) and out:
            out = out[0]
        else:
            return None
    return out


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


@contextlib.contextmanager
def _same_random_state(model: nn.Module) -> Iterator[None]:
    """The generators of the CPU and of the model's GPU go on as if nothing had run."""
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    on_gpu = device.type in ("cuda", "xpu")  # others have one generator for all devices, which fork_rng cannot handle
    devices = [device.index or 0] if on_gpu else []
    with torch.random.fork_rng(devices=devices, device_type=device.type if on_gpu else "cuda"):
        yield


@contextlib.contextmanager
def _small_detector(model: nn.Module) -> Iterator[None]:
    """A torchvision detector resizes to 800 pixels; for the dry run far fewer will do."""
    transform: Any = getattr(model, "transform", None)
    if not _is_detector(model) or transform.fixed_size is not None:
        yield
        return
    sizes = transform.min_size, transform.max_size
    try:
        transform.min_size, transform.max_size = (_DETECTOR_SIDE,), _DETECTOR_SIDE
        yield
    finally:
        transform.min_size, transform.max_size = sizes


def _is_detector(model: nn.Module) -> bool:
    """Whether the model is one of torchvision's detectors, which take a list of images."""
    return any(c.__name__ == "GeneralizedRCNNTransform" for c in type(getattr(model, "transform", None)).__mro__)


def _own_image_size(model: nn.Module) -> tuple[int, int] | None:
    embed = getattr(model, "patch_embed", None)
    config = getattr(model, "pretrained_cfg", None) or getattr(model, "default_cfg", None)
    size = config.get("input_size") if isinstance(config, dict) else None
    for found in (
        getattr(embed, "img_size", None),
        getattr(model, "image_size", None),
        size[1:] if size else None,
        getattr(getattr(model, "config", None), "image_size", None),
    ):
        if isinstance(found, int):
            return found, found
        if isinstance(found, (tuple, list)) and len(found) == 2:
            return int(found[0]), int(found[1])
    return None


def _channels(model: nn.Module) -> list[int]:
    """Numbers of input channels, most likely first.

    The first layer's are not always the model's: some begin with a change from space to depth.
    """
    first = _first_layer(model)
    config = getattr(model, "pretrained_cfg", None)
    named = getattr(model, "in_chans", None)
    found = [
        named if isinstance(named, int) else None,
        first.in_channels if is_conv(first) else None,  # type: ignore[arg-type, union-attr]
        config["input_size"][0] if isinstance(config, dict) and config.get("input_size") else None,
        3,
        1,
    ]
    return list(dict.fromkeys(n for n in found if isinstance(n, int)))


def _transformers_guesses(config: Any, main: str, size: int | None, like: dict[str, Any]) -> Iterator[Example]:
    if main == "pixel_values":
        side = size or getattr(config, "image_size", None) or 224
        side = side if isinstance(side, (tuple, list)) else (side, side)
        frames = getattr(config, "num_frames", None)
        shape = (1, *((frames,) if isinstance(frames, int) else ()), getattr(config, "num_channels", 3), *side)
        yield (), {main: torch.zeros(shape, **like)}
        return
    ids = torch.ones(1, 8, dtype=torch.long, device=like["device"])
    if isinstance(end := getattr(config, "eos_token_id", None), int):
        # Sequence classifiers of the BART family read the hidden state at the end-of-sentence token.
        ids[:, -1] = end
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
    tensor = leading_tensor(out)
    return None if tensor is None else tuple(tensor.shape)
