"""The floor: the fewest bytes that have to be kept for an exact backward when no matrix product is done twice.

Counted from the graph of one plain forward (:mod:`.steps`), from the kinds of the operators and the sizes of their
tensors alone; how torchgraft's own layers keep less plays no part. The rules, for a tensor of n elements:

* ReLU, ReLU6, Hardsigmoid, LeakyReLU: n bits; 0 where the output can be had from a tensor that is kept anyway.
  Dropout that acts: n bits.
* GELU, SiLU and other smooth activations, norms over channels: n elements, the input; norms also their statistics.
* Convolution and linear layer with a frozen weight, BatchNorm in eval mode, average pooling, sums, frozen scales: 0.
* The same with a trainable weight: n elements, the input.
* Trainable scale, trained affine of an eval-mode BatchNorm: n elements per *matrix product*, of its input or its
  output, whichever is less; 0 where the product's weight is trainable too, since the two are one weight then.
* Max pooling: 4 bits per output. Attention: q, k, v and the output, or q, k, v and the attention matrix where no fused
  kernel runs. A product of two activations (squeeze-and-excitation): both.

Whatever follows elementwise, or by a norm, from one kept tensor is not kept again, and a tensor that is read for two
reasons counts once. Tensors of parameters only (a changed weight) count nothing.
"""

from __future__ import annotations

import collections
import dataclasses
import math
from collections.abc import Iterator

from torch import nn

from ..core.graft import RESERVED
from ..core.head import HEAD_SLOT
from ..core.probe import Example
from ..swap import original_class
from .steps import Held, Key, Step, steps

MASKS, SMOOTH, NORMS, ATTENTION = "masks", "smooth activations", "norms", "attention"
INPUTS, HIDDEN, POOLING, HEAD, GATES, OTHER = "module inputs", "hidden layers", "pooling", "head", "gates", "other"
PARTS = (MASKS, SMOOTH, NORMS, ATTENTION, GATES, INPUTS, HIDDEN, POOLING, HEAD, OTHER)
"""What a byte of the floor is kept for; ``other``: operators without a rule, which count what PyTorch keeps."""

_MASKED = {"Relu", "Hardtanh", "Hardsigmoid", "LeakyRelu", "Threshold", "Clamp", "ClampMin", "ClampMax"}
_SMOOTH = {"Gelu", "Silu", "Hardswish", "Mish", "Elu", "Sigmoid", "Tanh", "Softplus", "LogSigmoid"}
_NORMS = {"NativeLayerNorm", "NativeGroupNorm", "FusedRmsNorm", "RmsNorm"}
_PADS = {f"{kind}Pad{dims}D" for kind in ("Reflection", "Replication") for dims in (1, 2, 3)}
_FREE = _PADS | {"AvgPool2D", "AvgPool3D", "AdaptiveAvgPool2D", "AdaptiveAvgPool3D"}
"""What keeps its input for the shape alone."""
_PRODUCTS = {"Convolution": ("input", 0, 1), "Addmm": ("mat1", 1, 2), "Mm": ("self", 0, 1)}
"""Products with a weight: the name under which the input is kept, and the numbers of input and weight."""
_ATTENTION = {"Bmm", "Baddbmm", "Softmax"}
_SCALES: dict[str, dict[str, tuple[int, ...]]] = {
    "Mul": {"self": (1,), "other": (0,)},
    "Div": {"self": (1,), "other": (0, 1)},
    "Addcmul": {"tensor1": (2,), "tensor2": (1,)},
}
"""Elementwise products: by the name of what is kept, the numbers of the arguments whose gradients read it."""
_RESHAPES = {
    "View", "UnsafeView", "ReshapeAlias", "Permute", "Transpose", "T", "Squeeze", "Unsqueeze", "Alias", "Clone",
}  # fmt: skip
"""The same elements in another order or shape."""
_SHRINKING = {"Select", "Slice", "Unbind", "Split", "SplitWithSizes", "ToCopy"}
"""Some of the elements, or all of them in another type."""
_GROWING = {"Expand", "ConstantPadNd", "Roll", *_PADS}
"""All of the elements, some of them perhaps more than once."""
_AFFINE = {"Add", "Sub", "NativeBatchNorm", *_SCALES}
"""What follows elementwise from one input if every other argument is computed of parameters only."""
_BITS_PER_POOLED = 4  # a place in a window of up to 16


@dataclasses.dataclass(frozen=True)
class Kept:
    """One entry of the floor.

    Attributes:
        bytes: Its size.
        part: One of :data:`PARTS`.
        path: Path of the module that needs it.
        layer: Class of that module; ``adapter`` or ``head`` in front for those that are trained.
    """

    bytes: int
    part: str
    path: str
    layer: str


@dataclasses.dataclass(frozen=True)
class Floor:
    """What :func:`floor` found."""

    entries: tuple[Kept, ...]

    @property
    def bytes(self) -> int:
        """All of it."""
        return sum(e.bytes for e in self.entries)

    def parts(self) -> dict[str, int]:
        """Bytes by what they are kept for, those that there are."""
        sums = _summed((e.part, e.bytes) for e in self.entries)
        return {part: sums[part] for part in PARTS if sums.get(part)}

    def layers(self) -> dict[str, int]:
        """Bytes by the class of the layer that needs them."""
        return _summed((e.layer, e.bytes) for e in self.entries)


def floor(model: nn.Module, example: Example) -> Floor:
    """The floor of the model as it stands, for its eval-mode forward of ``example``.

    Args:
        model: With adapters attached by ``attach(..., lean=False)``: every operator has to run as it is.
        example: Arguments; fake tensors will do, inside their mode.
    """
    count = _Count(model)
    for step in steps(model, example):
        count.needed(step)
    for step, held in count.scaled:
        count.need_product(step, held)
    for step, held in count.masked:
        count.need_mask(step, held)
    return Floor(tuple(count.entries))


def layer_label(model: nn.Module, path: str) -> str:
    """The class of the layer at ``path``, and whether it belongs to an adapter or to its head."""
    name = original_class(model.get_submodule(path)).__name__
    if not _in_adapter(path):
        return name
    return f"head {name}" if _in_head(path) else f"adapter {name}"


class _Count:
    """The entries so far and which tensors can be had from them."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.entries: list[Kept] = []
        self.kept: set[Key] = set()
        self.scaled: list[tuple[Step, Held]] = []
        self.masked: list[tuple[Step, Held]] = []

    # -- rules ------------------------------------------------------------------------------------------

    def needed(self, step: Step) -> None:
        """Keep what the step needs; scales and masks wait until it is known what is kept anyway."""
        held = step.saved
        if step.name in _MASKED:
            self.masked += [(step, t) for t in held.values()]
        elif step.name in _PRODUCTS:
            name, _, weight = _PRODUCTS[step.name]
            if step.wants(weight) and name in held:
                trained = not step.inputs[weight][0].of_data  # type: ignore[index]
                self.need(step, held[name], self._of_input(step, held[name]) if trained else ATTENTION)
            if "mat2" in held:
                self.need(step, held["mat2"], ATTENTION)
        elif step.name in _SCALES:
            self._product_of_two(step)
        elif step.name == "NativeBatchNorm" and not step.field("training"):
            if step.wants(1):
                self.scaled.append((step, held["input"]))
        elif "MaxPool" in step.name:
            indices = next((t for name, t in held.items() if name in ("result1", "indices")), None)
            outputs = math.prod(indices.shape) if indices else 0
            self._enter(step, math.ceil(outputs * _BITS_PER_POOLED / 8), POOLING)
        elif step.name not in _FREE:
            part = self._part(step)
            for t in held.values():
                self.need(step, t, part)

    def need(self, step: Step, held: Held, part: str) -> None:
        """Keep a tensor, unless it follows from one that is kept."""
        if self._follows(held.key):
            return
        # The earliest tensor of a chain serves whatever else is read of the chain.
        earliest = _earliest(held)
        if earliest[0].name == "Bernoulli":  # of dropout: what stayed
            self._keep(step, earliest, _bits(held), MASKS)
        else:
            self._keep(step, earliest, held.bytes, part)

    def need_product(self, step: Step, held: Held) -> None:
        """Keep what the gradient of a scale asks for: the product it scales, or what that is a product of."""
        if self._follows(held.key):
            return
        factor = _factor(held)
        if factor is None or not self._follows(factor.key):
            chosen = held if factor is None or held.bytes < factor.bytes else factor
            self._keep(step, _earliest(chosen), chosen.bytes, self._of_input(step, held))

    def need_mask(self, step: Step, held: Held) -> None:
        """Keep one bit per element, unless the output follows from what is kept."""
        if not self._follows((step, 0)) and not self._follows(held.key):
            self._enter(step, _bits(held), HIDDEN if _in_adapter(step.path) else MASKS)

    def _product_of_two(self, step: Step) -> None:
        for name, readers in _SCALES[step.name].items():
            partners = [step.inputs[n] for n in readers if step.wants(n)]
            if name not in step.saved or not partners:
                continue
            if any(p is not None and p[0].of_data for p in partners):
                self.need(step, step.saved[name], self._part(step))
            else:
                self.scaled.append((step, step.saved[name]))

    # -- bookkeeping ------------------------------------------------------------------------------------

    def _follows(self, key: Key) -> bool:
        """Whether a tensor, or one that it follows from, is kept, or is the model's input."""
        return any(k in self.kept or k[0].name == "Input" for k in _chain(key))

    def _keep(self, step: Step, key: Key, size: int, part: str) -> None:
        self.kept.add(key)
        self._enter(step, size, part)

    def _enter(self, step: Step, size: int, part: str) -> None:
        if size:
            self.entries.append(Kept(size, part, step.path, layer_label(self.model, step.path)))

    def _part(self, step: Step) -> str:
        if _in_adapter(step.path):
            return HEAD if _in_head(step.path) else HIDDEN
        if step.name in _SMOOTH:
            return SMOOTH
        if "Norm" in step.name:
            return NORMS
        if step.name in _SCALES:
            return GATES
        return ATTENTION if step.name in _ATTENTION or "Attention" in step.name else OTHER

    def _of_input(self, step: Step, held: Held) -> str:
        """What the input of a trainable module counts as: it comes from the backbone or from an adapter."""
        if _in_head(step.path):
            return HEAD
        maker, _ = _earliest(held)
        # A low-rank branch may run both of its products in the frozen layer's own call.
        own = maker.name in _PRODUCTS and maker.path == step.path and maker.wants(_PRODUCTS[maker.name][2])
        return HIDDEN if own or _in_adapter(maker.path) else INPUTS


def _chain(key: Key) -> Iterator[Key]:
    """A tensor and, one after the other, those that it follows from by itself."""
    yield key
    while (before := _before(key)) is not None:
        key = before
        yield key


def _before(key: Key) -> Key | None:
    """The one tensor that this one follows from without a matrix product; None where there is no such one."""
    step, number = key
    unary = step.name in _MASKED | _SMOOTH | _RESHAPES | _SHRINKING | _GROWING or (step.name in _NORMS and number == 0)
    affine = step.name in _AFFINE and not (step.name == "NativeBatchNorm" and step.field("training"))
    if not unary and not affine:
        return None
    data = [i for i in step.inputs if i is not None and i[0].of_data]
    return data[0] if len(data) == step.activations == 1 else None


def _earliest(held: Held) -> Key:
    """The first tensor of the chain that is no larger: keeping it costs the same and serves more readers."""
    earliest = held.key
    for key in _chain(held.key):
        if key[0].name in _SHRINKING:
            return key
        earliest = key
    return earliest


def _factor(product: Held) -> Held | None:
    """What a product with a weight is a product of."""
    step, _ = _earliest(product)
    if step.name not in _PRODUCTS:
        return None
    name, argument, _ = _PRODUCTS[step.name]
    if name in step.saved:
        return step.saved[name]
    made, sizes = step.inputs[argument], step.field(f"{name}_sym_sizes")
    if made is None or sizes is None:
        return None
    return Held(made, math.prod(sizes) * product.bytes // math.prod(product.shape), tuple(sizes))


def _bits(held: Held) -> int:
    """Bytes of one bit per element."""
    return math.ceil(math.prod(held.shape) / 8)


def _in_adapter(path: str) -> bool:
    return RESERVED in path.split(".")


def _in_head(path: str) -> bool:
    parts = path.split(".")
    return _in_adapter(path) and HEAD_SLOT in parts[parts.index(RESERVED) :]


def _summed(pairs: Iterator[tuple[str, int]]) -> dict[str, int]:
    sums: dict[str, int] = collections.defaultdict(int)
    for name, count in pairs:
        sums[name] += count
    return dict(sorted(sums.items(), key=lambda item: -item[1]))
