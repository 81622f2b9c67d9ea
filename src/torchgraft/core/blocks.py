"""Finding the blocks of a backbone and their stages.

Blocks are found from the outside in: the first module on the way down that stands in a list (or is one of
several numbered siblings) and whose class is called a block, bottleneck, layer, residual or unit, as they
are in timm, torchvision, transformers and most research code. A module of such a name that only holds a list
of others (a dense block, a CSP layer) is taken apart. Where no class has such a name, modules of one class
that repeat in a list are the blocks.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import re
from collections.abc import Iterator

from torch import nn

from .graft import RESERVED
from .layers import is_conv, is_norm
from .twins import original_names, rebuilt

_BLOCK = re.compile(
    r"Block|[Bb]ottle\d?[Nn]eck|Layer(V\d|\dd)?$|Residual|Unit|Separable|ConvBnAct|MBConv|MbConv|Cell|Inverted"
    r"|Basic[A-Z]?$|XceptionModule|MobileAttention|Outlooker"
)
_HOLDER = re.compile(r"(Stage(Block)?|Stack|Blocks|Encoder|Decoder)$")
_NO_BLOCK = re.compile(r"(Conv|Linear|SE|Norm|Act)Layer|Squeeze|Dropout|Embed|Merging|Downsample$|Transition")
_PART_OF_BLOCK = re.compile(r"Separable|ConvBnAct|Unit")
"""Blocks in some networks, layers of a block in others."""
_BETWEEN = re.compile(r"^(stem(_?\d+|_\w+)?|downsample\w*)$")
"""Attribute names that hold no blocks: what stands before and between the stages."""
_LISTS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


@dataclasses.dataclass(frozen=True)
class Block:
    """One block: its path, its stage and its number inside the stage (both from 0), its class name."""

    path: str
    stage: int
    index: int
    name: str


@dataclasses.dataclass(frozen=True)
class Stage:
    """A run of blocks at one resolution.

    Attributes:
        root: Path of the outermost module that holds this stage and no other; empty where there is none.
        blocks: Its blocks, in the order of the model.
        numbered: Whether the model itself numbers its stages (``layer1``, ``stages.0``), so that addresses
            name the stage even when there is only one.
    """

    root: str
    blocks: tuple[Block, ...]
    numbered: bool = True


def find_stages(model: nn.Module) -> list[Stage]:
    """All stages in the order of the model, each with its blocks."""
    names = original_names(model)
    found = _Finder(model, names).blocks()
    parents = list(dict.fromkeys(_parent(original) for _, original, _ in found))
    roots = _roots(parents, _first_layer(model, names))
    groups: dict[str, list[tuple[str, nn.Module]]] = {}
    for path, original, module in found:
        groups.setdefault(roots[_parent(original)], []).append((path, module))
    here = {original: path for path, original in names.items()}
    stages = []
    for number, (root, members) in enumerate(groups.items()):
        blocks = tuple(Block(p, number, i, class_name(m)) for i, (p, m) in enumerate(members))
        first, _, rest = root.partition(".")
        two = f"{first}.{rest.partition('.')[0]}"
        real = here[two] + root[len(two) :] if two in here else root
        missing = names and real and real.partition(".")[0] not in model._modules
        holds_others = any(r != root and (not root or r.startswith(root + ".")) for r in groups)
        stages.append(Stage("" if missing or holds_others else real, blocks, len(groups) > 1 or _digit(root)))
    return stages


def inner_modules(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """``named_modules`` without the module itself and without what adapters added."""
    for path, inner in module.named_modules():
        if path and RESERVED not in path.split("."):
            yield path, inner


def class_name(module: nn.Module) -> str:
    """The name of the module's own class, adapted or not."""
    return _own_class(module).__name__


def _own_class(module: nn.Module) -> type:
    from ..swap import original_class

    return original_class(module)


def called_block(module: nn.Module) -> bool:
    """Whether the module's class has the name of a block."""
    name = class_name(module)
    if isinstance(module, _LISTS) and not name.endswith(("Block", "Layer")):
        return False
    other = _NO_BLOCK.search(name) or _HOLDER.search(name) or is_norm(module)
    return bool(_BLOCK.search(name)) and not other and _layers(module) > 0


class _Finder:
    """The search for the blocks of one model."""

    def __init__(self, model: nn.Module, names: dict[str, str]) -> None:
        self.model, self.names = model, names

    def blocks(self) -> list[tuple[str, str, nn.Module]]:
        """(path, path before flattening, module) of every block, in the order of the model."""
        found = list(self._search(self.model, "", "", named=True))
        return found or list(self._search(self.model, "", "", named=False))

    def _search(
        self, module: nn.Module, path: str, original: str, *, named: bool
    ) -> Iterator[tuple[str, str, nn.Module]]:
        for listed, children in self._groups(module, path, original):
            chosen = {p for p, _, child in children if self._is_block(child, listed, p, named)}
            if listed and chosen:
                chosen |= {p for p, _, child in children if self._beside_blocks(child)}
            for here, before, child in children:
                if any(_BETWEEN.match(part) for part in before.split(".")):
                    continue
                if here in chosen:
                    yield here, before, child
                    continue
                inner = list(self._search(child, here, before, named=named))
                if not inner and named and isinstance(child, _LISTS):
                    inner = list(self._search(child, here, before, named=False))
                yield from [(here, before, child)] if self._wraps_one_residual(child, inner, listed) else inner

    def _groups(
        self, module: nn.Module, path: str, original: str
    ) -> list[tuple[bool, list[tuple[str, str, nn.Module]]]]:
        """The children of a module as (do they stand in a list, [(path, original path, child)]).

        What a feature extractor flattened is put back into its list.
        """
        names = self.names if module is self.model else {}
        lists: dict[str, list[tuple[str, str, nn.Module]]] = {}
        for name, child in module.named_children():
            if name == RESERVED:
                continue
            before = names.get(name, name)
            row = (_join(path, name), _join(original, before), child)
            lists.setdefault(before.rpartition(".")[0], []).append(row)
        plain = isinstance(module, _LISTS) and not (module is self.model and rebuilt(module))
        return [(bool(holder) or plain, rows) for holder, rows in lists.items()]

    def _is_block(self, module: nn.Module, listed: bool, path: str, named: bool) -> bool:
        if not listed and not path[-1].isdigit():
            return False
        if not named:
            return listed and self._repeats(module) and not self._holds_others(module, named=False)
        return called_block(module) and not self._holds_others(module, named=True)

    def _beside_blocks(self, module: nn.Module) -> bool:
        """A composite that stands in a list with blocks is one too, whatever its class is called."""
        own = not isinstance(module, _LISTS) and not is_norm(module) and not _NO_BLOCK.search(class_name(module))
        return own and _layers(module) > 1 and _composite(module) and not self._holds_others(module, named=True)

    def _holds_others(self, module: nn.Module, *, named: bool) -> bool:
        """Whether a module is only the holder of a list of blocks and has no spatial convolution of its own."""
        inner: list[str] = []
        for path, child in inner_modules(module):
            if any(path.startswith(p + ".") for p in inner) or not isinstance(_at(module, _parent(path)), _LISTS):
                continue
            if _layers(child) > 1 and (
                called_block(child) and not _PART_OF_BLOCK.search(class_name(child)) if named else self._repeats(child)
            ):
                inner.append(path)
        if not inner:
            return False
        return not any(
            is_conv(m) and max(m.kernel_size) > 1  # type: ignore[arg-type]
            for p, m in inner_modules(module)
            if not any(p.startswith(i + ".") for i in inner) and not any(_BETWEEN.match(part) for part in p.split("."))
        )

    def _repeats(self, module: nn.Module) -> bool:
        """Whether the module is a composite of a class of its own that several lists' elements share."""
        own = not isinstance(module, _LISTS) and _composite(module) and not is_norm(module)
        return (
            own
            and not _NO_BLOCK.search(class_name(module))
            and _layers(module) > 1
            and self._listed_classes[_own_class(module)] > 1
        )

    @functools.cached_property
    def _listed_classes(self) -> collections.Counter[type]:
        lists = [m for _, m in inner_modules(self.model) if isinstance(m, _LISTS)]
        flattened = [self.model] if rebuilt(self.model) else []
        return collections.Counter(_own_class(c) for m in [*lists, *flattened] for c in m.children())

    @staticmethod
    def _wraps_one_residual(module: nn.Module, inner: list[tuple[str, str, nn.Module]], listed: bool) -> bool:
        """``Sequential(Residual(...), conv, ...)`` in a list (ConvMixer): the block is the whole element."""
        if not listed or len(inner) != 1 or not isinstance(module, nn.Sequential):
            return False
        return class_name(inner[0][2]) == "Residual" and any(is_conv(m) for m in module.children())


def _layers(module: nn.Module) -> int:
    """Number of convolutions and linear layers inside."""
    inside = [module, *(m for _, m in inner_modules(module))]
    return sum(is_conv(m) or isinstance(m, nn.Linear) for m in inside)


def _composite(module: nn.Module) -> bool:
    """Whether the module has children of its own, not only what adapters added."""
    return any(name != RESERVED for name in module._modules)


def _roots(parents: list[str], first_layer: str) -> dict[str, str]:
    """The stage root of every parent of blocks: down to the first numbered name that is the stage's own.

    A number that all parents share, or whose module also holds the model's first layer, is no stage. Runs of
    blocks side by side under plain names (``blocks``, ``blocks_token_only``) count as one.
    """
    split = {p: p.split(".") if p else [] for p in parents}
    shared = 0
    while len(split) > 1 and len({tuple(s[: shared + 1]) for s in split.values()}) == 1:
        shared += 1
    roots = {}
    for parent, parts in split.items():
        heads = [".".join(parts[: i + 1]) for i in range(shared, len(parts))]
        numbered = next((h for h in heads if _digit(h) and not first_layer.startswith(h + ".")), None)
        roots[parent] = numbered or (heads[0] if len(split) > 1 and heads else parent)
    plain = [p for p in parents if not _digit(roots[p])]
    above = {_parent(p) for p in plain}
    if len(plain) > 1 and len(plain) == len(parents) and len(above) == 1 and not above & set(plain):
        return dict.fromkeys(plain, above.pop())
    return roots


def _first_layer(model: nn.Module, names: dict[str, str]) -> str:
    for path, module in inner_modules(model):
        if is_conv(module) or isinstance(module, (nn.Linear, nn.Embedding)):
            first, _, rest = path.partition(".")
            return _join(names.get(first, first), rest) if rest else names.get(first, first)
    return ""


def _digit(name: str) -> bool:
    return name[-1:].isdigit()


def _parent(path: str) -> str:
    return path.rpartition(".")[0]


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _at(module: nn.Module, path: str) -> nn.Module:
    return module.get_submodule(path) if path else module
