"""The anatomy of a backbone: its stages, blocks and sites, found by structure and checked by a dry run."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable, Iterator
from typing import Any

from torch import nn

from ..errors import GraftError
from .address import Addresses, Selection
from .blocks import Block, Stage, called_block, class_name, find_stages, inner_modules
from .branches import Branch, branches_of
from .layers import ConvGeometry, in_channels, is_conv, is_norm, kind_of, out_channels
from .layout import layout_at
from .placements.base import Point
from .placements.branch import Layout
from .probe import Example, Trace, dry_run
from .roles import roles_in_block
from .twins import original_names, wrapped_in


@dataclasses.dataclass(frozen=True)
class Site:
    """One place in a backbone that a method can adapt.

    Attributes:
        path: Module path in this model.
        address: Canonical address, the same in every twin of the model.
        role: What the module does there: inside blocks as in
            :func:`torchgraft.core.roles.roles_in_block`, and ``block``, ``stem`` (convolutions ahead of the
            blocks), ``downsample`` (spatial convolutions between blocks), ``head`` (classifiers), ``conv``,
            ``linear``, ``norm``; ``module`` for any other module.
        kind: Layer kind (:func:`torchgraft.core.layers.kind_of`).
        in_channels: Channels or features it reads; None for modules without the notion.
        out_channels: Channels or features it returns.
        kernel: Kernel size of a convolution, else None.
        block: Path of the block it belongs to, None outside blocks.
        fires: Whether the dry run saw it being called; None when there was no dry run.
    """

    path: str
    address: str
    role: str
    kind: str
    in_channels: int | None = None
    out_channels: int | None = None
    kernel: tuple[int, ...] | None = None
    block: str | None = None
    fires: bool | None = None

    def to_dict(self) -> dict[str, Any]:
        """The site as plain data."""
        return dataclasses.asdict(self)


class Anatomy:
    """A model's map from addresses to modules.

    Args:
        model: The backbone, adapted or not.
        example: Input of the dry run; default: guessed from the model's own configuration.
        include: Which part of the model methods may use (see :class:`~torchgraft.core.address.Selection`).
        exclude: Which part they may not use.
        input_size: Side of the image in pixels for a guessed example.
        trace: The record of a dry run of this very model; default: one is made.

    Attributes:
        modules: Every module by its path, without what adapters added.
        stages: The stages with their blocks.
        blocks: The blocks of all stages.
        trace: The dry run's record, None when the model accepted no guess.
        stem: Path of the first layer with weights.
        base: Path of the module that holds the backbone (empty: the model itself), as in a detector.
        head: Path of the classifier, None for a feature extractor; the module that holds them where a model
            keeps several in one place.
        heads: Paths of the classifiers' layers: one in most models, two in distilled ones.
        sites: Every site inside the selection, in the order of the model.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        example: Example | None = None,
        include: str | Iterable[str] | None = None,
        exclude: str | Iterable[str] | None = None,
        input_size: int | None = None,
        trace: Trace | None = None,
    ) -> None:
        self.model = model
        self.modules = dict(inner_modules(model))
        self.stages: list[Stage] = find_stages(model)
        self.blocks: list[Block] = [b for s in self.stages for b in s.blocks]
        self._block_paths = {b.path for b in self.blocks}
        self.trace: Trace | None = trace or dry_run(model, example, input_size)
        self.stem = next((p for p in self._called() if self._is_first(self.modules[p])), None)
        self.base = self._find_base()
        self.head, self.heads = self._find_heads()
        self._addresses = Addresses(self.modules, self.stages, [self.base, wrapped_in(model)], original_names(model))
        self.selection = Selection(include, exclude, [len(s.blocks) for s in self.stages])
        self.selection.check((p, self.address(p)) for p in self.modules)
        self._all = {s.path: s for s in self._find_sites()}
        self.sites = [s for s in self._all.values() if self.selection(s.path, s.address)]

    # -- looking things up ------------------------------------------------------------------------------

    def module(self, path: str) -> nn.Module:
        """The module at ``path`` (the model itself for an empty path)."""
        return self.modules[path] if path else self.model

    def address(self, path: str) -> str:
        """Canonical address of the module at ``path``."""
        return self._addresses.address(path)

    def path(self, address: str) -> str:
        """Module path of a canonical address.

        Raises:
            GraftError: No module of this model has the address.
        """
        return self._addresses.path(address)

    def find(self, *roles: str) -> list[Site]:
        """The selected sites with one of these roles.

        A layer that ``include`` names exactly counts as a ``spatial_conv`` when it is a convolution, even
        where the anatomy gives it a lesser role.
        """
        found = []
        for site in self.sites:
            lesser = site.role in ("conv", "stem", "downsample") and "spatial_conv" in roles and site.kernel is not None
            if site.role in roles or (lesser and self.selection.explicit(site.path, site.address)):
                found.append(site)
        return found

    def site(self, path: str) -> Site:
        """The site of any module, listed among the sites or not."""
        return self._all.get(path) or self._make(path, "module", self.block_of(path))

    def inside(self, block: str, *roles: str) -> list[Site]:
        """The sites of one block, selected or not, with one of these roles (any, where none is named)."""
        return [s for s in self._by_block.get(block, []) if not roles or s.role in roles]

    def branches(self, *kinds: str) -> list[Branch]:
        """The residual branches of the selected blocks, of these kinds (``attn``, ``cross``, ``mlp``; default: all)."""
        found = [b for site in self.find("block") for b in branches_of(self, site.path)]
        return [b for b in found if not kinds or b.kind in kinds]

    def block_of(self, path: str) -> str | None:
        """Path of the block that the module is or belongs to, None outside blocks."""
        while path and path not in self._block_paths:
            path = path.rpartition(".")[0]
        return path or None

    def shapes(self, path: str) -> tuple[tuple[int, ...] | None, tuple[int, ...] | None]:
        """Input and output shape that the dry run saw at ``path``."""
        call = self.trace.calls.get(path) if self.trace else None
        return (call.input, call.output) if call else (None, None)

    def calls(self, path: str) -> int:
        """How often the dry run called the module; 1 when there was no dry run."""
        if self.trace is None:
            return 1
        return self.trace.calls[path].count if path in self.trace.calls else 0

    # -- geometry ---------------------------------------------------------------------------------------

    def channels(self, point: Point, layout: Layout) -> int:
        """Number of channels of the tensor at ``point``."""
        shape = self.shape(point)
        return shape[1] if layout.name == "NC..." else shape[-1]

    def shape(self, point: Point) -> tuple[int, ...]:
        """Shape of the tensor at ``point`` in the dry run.

        Raises:
            GraftError: The dry run did not see the point.
        """
        shape = self.shapes(point.path)[0 if point.side == "input" else 1]
        if shape is None:
            raise GraftError(
                f"the {point} was not seen in the dry run"
                + ("" if self.trace else " (the model accepted no guessed input: give `example=`)")
            )
        return shape

    def layout(self, point: Point) -> Layout:
        """How the tensor at ``point`` holds its channels; see :func:`torchgraft.core.layout.layout_at`."""
        return layout_at(self, point)

    def conv_dims(self) -> int:
        """Spatial dimensions of the model's first convolution (2 where it has none)."""
        return next((len(m.kernel_size) for m in self.modules.values() if is_conv(m)), 2)  # type: ignore[arg-type]

    # -- construction -----------------------------------------------------------------------------------

    @functools.cached_property
    def _by_block(self) -> dict[str, list[Site]]:
        found: dict[str, list[Site]] = {}
        for site in self._all.values():
            found.setdefault(site.block or "", []).append(site)
        return found

    def _called(self) -> list[str]:
        """The modules in the order in which they ran; in that of the model when there was no dry run."""
        if self.trace is None:
            return list(self.modules)
        return [p for p in self.trace.calls if p in self.modules]

    @staticmethod
    def _is_first(module: nn.Module) -> bool:
        return is_conv(module) or isinstance(module, (nn.Linear, nn.Embedding))

    def _find_sites(self) -> Iterator[Site]:
        roles: dict[str, tuple[str, str | None]] = {}
        for block in self.blocks:
            roles[block.path] = ("block", block.path)
            for inner, role in roles_in_block(self.modules[block.path], block.name).items():
                roles[f"{block.path}.{inner}"] = (role, block.path)
        before, between = self._ahead_of_and_between_blocks()
        for path, module in self.modules.items():
            if path in self.heads:
                yield self._make(path, "head", None)
            elif path == self.stem:
                yield self._make(path, "stem", roles.get(path, ("", None))[1])
            elif path in roles:
                yield self._make(path, *roles[path])
            elif is_norm(module):
                yield self._make(path, "norm", None)
            elif is_conv(module):
                spatial = max(ConvGeometry.of(module).kernel) > 1
                inside = "downsample" if path in between else "conv"
                flat = not self.blocks and path.startswith(self.base)
                role = ("spatial_conv" if flat else inside) if spatial else "conv"
                yield self._make(path, "stem" if path in before else role, None)
            elif isinstance(module, nn.Linear):
                yield self._make(path, "linear", None)

    def _ahead_of_and_between_blocks(self) -> tuple[set[str], set[str]]:
        """The modules that run before the first block, and those that run before the last one has ended.

        Blocks that are only known by repetition do not tell where a network begins and ends: there everything
        behind the stem counts as between them.
        """
        order = self._called()
        inside = [i for i, p in enumerate(order) if self.block_of(p) is not None]
        if not inside:
            return set(), set()
        if not any(called_block(self.modules[b.path]) for b in self.blocks):
            return set(), set(order)
        return set(order[: inside[0]]), set(order[inside[0] : inside[-1]])

    def _make(self, path: str, role: str, block: str | None) -> Site:
        module = self.module(path)
        return Site(
            path=path,
            address=self.address(path),
            role=role,
            kind=kind_of(module) if role not in ("block", "attn", "mlp", "module") else class_name(module),
            in_channels=in_channels(module),
            out_channels=out_channels(module),
            kernel=ConvGeometry.of(module).kernel if is_conv(module) else None,
            block=block,
            fires=None if self.trace is None else self.trace.fired(path),
        )

    def _find_base(self) -> str:
        """The module that holds the stem and every block; addresses outside blocks are relative to it."""
        wrapper = wrapped_in(self.model)
        if not wrapper and not self.blocks and (self.stem or "").startswith("backbone."):
            wrapper = "backbone"
        if not self.blocks or self.stem is None:
            return wrapper
        common = self.stem.split(".")[:-1]
        for block in self.blocks:
            parts = block.path.split(".")
            same = (i for i, (a, b) in enumerate(zip(common, parts, strict=False)) if a != b)
            common = common[: next(same, min(len(common), len(parts) - 1))]
        while common and isinstance(self.modules[".".join(common)], (nn.Sequential, nn.ModuleList)):
            common.pop()
        return ".".join(common) or wrapper

    def _find_heads(self) -> tuple[str | None, list[str]]:
        """The classifier and its layers: what the model itself names, else the layer that makes its flat output."""
        if callable(getattr(self.model, "get_classifier", None)):
            named: Any = self.model.get_classifier()  # type: ignore[operator]
            paths = {id(m): p for p, m in self.modules.items()}
            if isinstance(named, (tuple, list)):
                listed = [paths[id(m)] for m in named if id(m) in paths]
                return (listed[0] if listed else None), listed
            path = paths.get(id(named))
            layers = [] if path is None else self._classifier_layers(path)
            return (layers[0] if len(layers) == 1 else path), layers
        whole = self.trace.calls.get("") if self.trace else None
        if whole is None or whole.output is None or len(whole.output) != 2:
            return None, []
        called = [p for p in self._called() if is_conv(self.modules[p]) or isinstance(self.modules[p], nn.Linear)]
        # A convolution may still be pooled (SqueezeNet).
        found = [
            p
            for p in called[-1:]
            if (shape := self.shapes(p)[1]) is not None
            and (shape == whole.output or (is_conv(self.modules[p]) and shape[:2] == whole.output))
        ]
        return (found[0] if found else None), found

    def _classifier_layers(self, path: str) -> list[str]:
        """The layers with one output per class inside a classifier that is more than one layer."""
        classes = getattr(self.model, "num_classes", None)
        inner = {p: m for p, m in inner_modules(self.modules[path]) if is_conv(m) or isinstance(m, nn.Linear)}
        layers = [p for p, m in inner.items() if out_channels(m) == classes] or list(inner)[-1:]
        return [f"{path}.{p}" for p in layers] or [path]


def anatomy(
    model: nn.Module,
    *,
    example: Example | None = None,
    include: str | Iterable[str] | None = None,
    exclude: str | Iterable[str] | None = None,
    input_size: int | None = None,
) -> Anatomy:
    """The anatomy of ``model``; nothing is changed. Arguments as for :class:`Anatomy`."""
    return Anatomy(model, example=example, include=include, exclude=exclude, input_size=input_size)
