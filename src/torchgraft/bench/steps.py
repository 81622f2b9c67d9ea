"""What one forward left in the autograd graph: its steps, who ran them, what they keep, what they read of.

The graph is PyTorch's own account of a computation: a node per operator through which a gradient flows, and nothing
below the first trainable module. Hooks on modules are read-only, and are gone when the run ends.
"""

from __future__ import annotations

import bisect
import contextlib
import dataclasses
import math
import re
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ..core.probe import Example, leading_tensor

Key = tuple["Step", int]
"""Identity of a tensor: the step that made it and the number of the output."""


@dataclasses.dataclass(frozen=True)
class Held:
    """A tensor that a step reads in its backward.

    Attributes:
        key: Which tensor.
        bytes: Size of its own elements, whatever storage they are a view of.
        shape: Shape.
    """

    key: Key
    bytes: int
    shape: tuple[int, ...]


@dataclasses.dataclass(eq=False)
class Step:
    """One operator of the forward.

    Attributes:
        name: The operator, as its backward is called: ``Convolution``, ``NativeLayerNorm``; ``Input`` for what made
            the model's input.
        node: The node of the graph; None below the first trainable module, where there is no graph.
        path: Path of the module that ran it; empty where there is no graph.
        inputs: Per differentiable argument, the step that made it and the number of the output; None where no
            gradient is wanted. A parameter's step is called ``AccumulateGrad``. Without a graph: the activations.
        saved: By argument name, what it keeps that depends on the model's input; no parameters, nothing computed
            of parameters only. Without a graph: the activations that it reads.
        activations: How many different tensors that depend on the model's input it reads.
        of_data: Whether its output depends on the model's input.
    """

    name: str
    node: Any
    path: str = ""
    inputs: list[Key | None] = dataclasses.field(default_factory=list)
    saved: dict[str, Held] = dataclasses.field(default_factory=dict)
    activations: int = 0
    of_data: bool = False

    def wants(self, argument: int) -> bool:
        """Whether a gradient is wanted for the argument with this number."""
        return len(self.inputs) > argument and self.inputs[argument] is not None

    def field(self, name: str) -> Any:
        """A plain value that the node keeps, such as ``training``; None when there is none."""
        return getattr(self.node, f"_saved_{name}", None)


def steps(model: nn.Module, example: Example) -> list[Step]:
    """Run ``model`` once and list the steps of its graph in the order of the forward.

    Works on fake tensors too, inside their mode. Every intermediate tensor lives until this returns.
    """
    running, follows = Running(), _Follows(tree_leaves(example))
    with torch.enable_grad(), running.of(model), follows:
        out = leading_tensor(model(*example[0], **example[1]))
    return [] if out is None else _walk(out.grad_fn, running, follows)


class Running:
    """Which module runs now, and which ran when a node of the graph was made."""

    def __init__(self) -> None:
        self._numbers: list[int] = [0]  # the number that autograd gives to the next node, at every change
        self._paths: list[str] = [""]
        self._stack: list[str] = [""]

    @property
    def path(self) -> str:
        """Path of the innermost module that runs."""
        return self._stack[-1]

    @contextlib.contextmanager
    def of(self, model: nn.Module) -> Iterator[None]:
        """Watch every module of ``model``, those of adapters too."""
        handles = []
        try:
            for path, module in model.named_modules():
                handles.append(module.register_forward_pre_hook(self._enter(path)))
                handles.append(module.register_forward_hook(self._leave, always_call=True))
            yield
        finally:
            for handle in handles:
                handle.remove()

    def owner(self, number: int) -> str:
        """Path of the innermost module that ran when the node with this number was made."""
        return self._paths[bisect.bisect_right(self._numbers, number) - 1]

    def _enter(self, path: str) -> Any:
        def hook(module: nn.Module, args: Any) -> None:
            self._stack.append(path)
            self._note()

        return hook

    def _leave(self, module: nn.Module, args: Any, out: Any) -> None:
        self._stack.pop()
        self._note()

    def _note(self) -> None:
        self._numbers.append(torch._C._autograd._get_sequence_nr())
        self._paths.append(self._stack[-1])


class _Follows(TorchDispatchMode):
    """Marks every storage that the model's input has a part in, and knows which operator last wrote where."""

    def __init__(self, leaves: list[Any]) -> None:
        super().__init__()
        self.marked: dict[int, Tensor] = {}  # holds the tensors, so that no address is used twice
        self.writers: dict[tuple[int, int], Key] = {}
        self.activations: dict[int, int] = {}  # by the sequence number of the operator's node
        self._mark(Step("Input", None, of_data=True), leaves)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        read = {
            argument.name: held(value, self.writer(value))
            for argument, value in zip(func._schema.arguments, args, strict=False)
            if self.reaches(value)
        }
        inputs = list(dict.fromkeys(self.writer(t) for t in tree_leaves((args, kwargs)) if self.reaches(t)))
        # Where there is a graph, the operator's node has just been made; others come after the first of that number.
        self.activations.setdefault(torch._C._autograd._get_sequence_nr() - 1, len(inputs))
        out = func(*args, **kwargs)
        if inputs:
            step = Step(_camel(func._schema.name), None, "", [*inputs], read, len(inputs), True)
            self._mark(step, tree_leaves(out))
        return out

    def reaches(self, value: Any) -> bool:
        """Whether ``value`` is a tensor that depends on the input."""
        return isinstance(value, Tensor) and value.untyped_storage()._cdata in self.marked

    def writer(self, tensor: Tensor) -> Key:
        """The operator that last wrote where ``tensor`` begins."""
        place = tensor.untyped_storage()._cdata, int(tensor.storage_offset())
        return self.writers.get(place, (Step("Unknown", None, of_data=True), 0))

    def _mark(self, step: Step, leaves: list[Any]) -> None:
        for number, leaf in enumerate(leaves):
            if isinstance(leaf, Tensor):
                storage = leaf.untyped_storage()._cdata
                self.marked.setdefault(storage, leaf.detach())
                self.writers[storage, int(leaf.storage_offset())] = (step, number)


def _walk(root: Any, running: Running, follows: _Follows) -> list[Step]:
    nodes: dict[Any, None] = {}
    stack = [root]
    while stack:
        node = stack.pop()
        if node is not None and node not in nodes:
            nodes[node] = None
            stack += [before for before, _ in node.next_functions]
            stack += [t.grad_fn for _, t in _saved(node)]  # an in-place activation keeps a copy, outside the graph
    found: dict[Any, Step] = {}
    leaves = [n for n in nodes if _is_leaf(n)]
    inner = sorted((n for n in nodes if not _is_leaf(n)), key=lambda n: n._sequence_nr())
    for node in (*leaves, *inner):
        found[node] = Step(_operator(node), node)
    for node in inner:
        step = found[node]
        step.path = running.owner(node._sequence_nr())
        step.inputs = [None if before is None else (found[before], number) for before, number in node.next_functions]
        step.saved = {
            name: held(t, (found[t.grad_fn], t.output_nr) if t.grad_fn in found else follows.writer(t))
            for name, t in _saved(node)
            if follows.reaches(t)
        }
        made_of = {i for i in step.inputs if i is not None and i[0].of_data}
        step.activations = follows.activations.get(node._sequence_nr(), len(made_of))
        step.of_data = step.activations > 0 or bool(made_of)
    return [found[node] for node in inner]


def _saved(node: Any) -> Iterator[tuple[str, Tensor]]:
    """The tensors that a node keeps, by argument; those of an ``autograd.Function`` by number."""
    for attribute in dir(node):
        if attribute.startswith("_saved_"):
            value = getattr(node, attribute)
            for tensor in value if isinstance(value, (tuple, list)) else (value,):
                if isinstance(tensor, Tensor):
                    yield attribute.removeprefix("_saved_"), tensor
    for number, tensor in enumerate(getattr(node, "saved_tensors", ())):
        if isinstance(tensor, Tensor):
            yield str(number), tensor


def held(tensor: Tensor, key: Key) -> Held:
    """``tensor`` under its identity; elements that an expanded tensor shows many times count once."""
    own = (size for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride)
    return Held(key, math.prod(own) * tensor.element_size(), tuple(tensor.shape))


def _is_leaf(node: Any) -> bool:
    return "AccumulateGrad" in node.name()


def _operator(node: Any) -> str:
    """``torch::autograd::AccumulateGrad`` -> ``AccumulateGrad``; ``MeanBackward1`` -> ``Mean``."""
    return re.sub(r"Backward\d*$", "", node.name().rpartition("::")[2])


def _camel(name: str) -> str:
    """``aten::native_batch_norm`` -> ``NativeBatchNorm``, as the operator's backward is called."""
    return "".join(part.capitalize() for part in name.rpartition("::")[2].split("_"))
