"""The anatomy of a backbone: its stages, blocks and sites, found by structure and checked by a dry run."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterable, Iterator
from typing import Any

from timm.models._features import FeatureDictNet, FeatureGetterNet
from torch import nn

from ..errors import GraftError, nearest
from .address import Selection
from .blocks import Block, Stage, class_name, find_stages, inner_modules, roles_in_block
from .layers import ConvGeometry, in_channels, is_conv, is_norm, kind_of, out_channels
from .placements.base import Point
from .placements.branch import Layout
from .probe import Example, Trace, dry_run


@dataclasses.dataclass(frozen=True)
class Site:
    """One place in a backbone that a method can adapt.

    Attributes:
        path: Module path in this model.
        address: Canonical address, the same in every twin of the model.
        role: What the module does there (``spatial_conv``, ``attn.qkv``, ``block``, ``norm``, ...).
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

    Attributes:
        stages: The stages with their blocks.
        trace: The dry run's record, None when the model accepted no guess.
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
    ) -> None:
        self.model = model
        self.modules = dict(inner_modules(model))
        self.stages: list[Stage] = find_stages(model)
        self.blocks: list[Block] = [b for s in self.stages for b in s.blocks]
        self.trace: Trace | None = dry_run(model, example, input_size)
        self.stem = self._find_stem()
        self.base = self._find_base()
        self._roots = {s.root: i for i, s in enumerate(self.stages)}
        self._numbers = {b.path: b for b in self.blocks}
        self.head = self._find_head()
        self.selection = Selection(include, exclude, [len(s.blocks) for s in self.stages])
        self.selection.check((p, self.address(p)) for p in self.modules)
        self._all = list(self._find_sites())
        self.sites = [s for s in self._all if self.selection(s.path, s.address)]

    # -- looking things up ------------------------------------------------------------------------------

    def module(self, path: str) -> nn.Module:
        """The module at ``path`` (the model itself for an empty path)."""
        return self.modules[path] if path else self.model

    def address(self, path: str) -> str:
        """Canonical address of the module at ``path``."""
        block = next((b for b in self._ancestors(path) if b in self._numbers), None)
        if block is not None:
            found = self._numbers[block]
            stage = f"stages[{found.stage}]." if len(self.stages) > 1 else ""
            return f"{stage}blocks[{found.index}]{path[len(block) :]}"
        root = next((r for r in self._ancestors(path) if r in self._roots), None)
        if root is not None and len(self.stages) > 1:
            return f"stages[{self._roots[root]}]{path[len(root) :]}"
        if self.base and path.startswith(self.base + "."):
            path = path[len(self.base) + 1 :]
        if isinstance(self.model, FeatureDictNet):
            path = re.sub(r"^([A-Za-z]\w*?)_(\d+)(?=\.|$)", r"\1.\2", path)
        return path

    def path(self, address: str) -> str:
        """Module path of a canonical address.

        Raises:
            GraftError: No module of this model has the address.
        """
        if not hasattr(self, "_paths"):
            self._paths = {self.address(p): p for p in ["", *self.modules]}
        if address not in self._paths:
            raise GraftError(f"this model has no site {address!r}; {nearest(address, self._paths)}")
        return self._paths[address]

    def find(self, *roles: str) -> list[Site]:
        """The selected sites with one of these roles.

        A layer that ``include`` names exactly counts as a ``spatial_conv`` when it is a convolution, even
        where the anatomy gives it a lesser role.
        """
        found = []
        for site in self.sites:
            named = self.selection.explicit(site.path, site.address)
            promoted = named and site.role in ("conv", "stem", "downsample") and "spatial_conv" in roles
            if site.role in roles or promoted:
                found.append(site)
        return found

    def site(self, path: str) -> Site:
        """The site of any module, listed among the sites or not."""
        found = next((s for s in self._all if s.path == path), None)
        return found or self._make(path, "module", None)

    def inside(self, block: str, *roles: str) -> list[Site]:
        """The sites of one block, selected or not, with one of these roles."""
        return [s for s in self._all if s.block == block and s.role in roles]

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
        """How the tensor at ``point`` holds its channels.

        Decided by the widths of the layers of the block: the axis that has their size holds the channels.
        """
        module = self.module(point.path)
        shape = self.shape(point)
        if is_conv(module):
            return Layout()
        if len(shape) == 3:
            if self.conv_dims() == 1:
                return Layout()
            prefix = getattr(self.model, "num_prefix_tokens", None)
            side = math.isqrt(shape[1])
            prefix = shape[1] - side * side if prefix is None else prefix
            return Layout("NLC", prefix, self._grid(shape[1] - prefix))
        widths = self._widths(point.path)
        first, last = shape[1] in widths, shape[-1] in widths
        return Layout("N...C") if last and (not first or self._tokens_inside(point.path)) else Layout()

    def conv_dims(self) -> int:
        """Spatial dimensions of the model's first convolution (2 where it has none)."""
        for module in self.modules.values():
            if is_conv(module):
                return ConvGeometry.of(module).dims
        return 2

    # -- construction -----------------------------------------------------------------------------------

    def _find_sites(self) -> Iterator[Site]:
        roles: dict[str, tuple[str, str | None]] = {}
        for block in self.blocks:
            roles[block.path] = ("block", block.path)
            for inner, role in roles_in_block(self.modules[block.path], block.name).items():
                roles[f"{block.path}.{inner}"] = (role, block.path)
        for path, module in self.modules.items():
            if path in roles:
                yield self._make(path, *roles[path])
            elif path == self.head:
                yield self._make(path, "head", None)
            elif path == self.stem:
                yield self._make(path, "stem", None)
            elif is_norm(module):
                yield self._make(path, "norm", None)
            elif is_conv(module):
                yield self._make(path, self._conv_role(path, module), None)
            elif isinstance(module, nn.Linear):
                yield self._make(path, "linear", None)

    def _conv_role(self, path: str, module: nn.Module) -> str:
        spatial = any(k > 1 for k in ConvGeometry.of(module).kernel)
        if not self.blocks:
            return "spatial_conv" if spatial else "conv"
        first = self.blocks[0].path
        names = list(self.modules)
        if names.index(path) < names.index(first):
            return "stem"
        return "downsample" if spatial else "conv"

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

    def _find_stem(self) -> str | None:
        """The first layer with weights that the dry run called (or that the model lists)."""
        order = list(self.modules)
        if self.trace is not None:
            order = sorted(self.trace.calls, key=lambda p: self.trace.calls[p].order)  # type: ignore[union-attr]
        for path in order:
            module = self.modules.get(path)
            if module is not None and (is_conv(module) or isinstance(module, (nn.Linear, nn.Embedding))):
                return path
        return None

    def _find_base(self) -> str:
        """The module that holds the stem and every block; addresses outside blocks are relative to it."""
        if isinstance(self.model, FeatureGetterNet):
            return "model"
        if not self.blocks or self.stem is None:
            return ""
        common = self.stem.split(".")[:-1]
        for block in self.blocks:
            parts = block.path.split(".")
            common = common[
                : next((i for i, (a, b) in enumerate(zip(common, parts, strict=False)) if a != b), len(common))
            ]
        while common and isinstance(self.modules[".".join(common)], (nn.Sequential, nn.ModuleList)):
            common.pop()
        return ".".join(common)

    def _find_head(self) -> str | None:
        """The classifier: what the model itself names, else the last linear layer with a flat output."""
        owner = self.model
        if callable(getattr(owner, "get_classifier", None)):
            found = owner.get_classifier()  # type: ignore[operator]
            found = found[0] if isinstance(found, (tuple, list)) and found else found
            return next((p for p, m in self.modules.items() if m is found), None)
        if self.trace is None:
            return None
        flat = [
            p
            for p, call in sorted(self.trace.calls.items(), key=lambda item: item[1].order)
            if isinstance(self.modules.get(p), nn.Linear) and call.output is not None and len(call.output) == 2
        ]
        whole = self.trace.calls.get("")
        if flat and whole is not None and whole.output == self.trace.calls[flat[-1]].output:
            return flat[-1]
        return None

    def _widths(self, path: str) -> set[int]:
        block = next((b for b in self._ancestors(path) if b in self._numbers), path)
        module = self.module(block)
        widths = {
            w for m in [module, *(m for _, m in inner_modules(module))] for w in (in_channels(m), out_channels(m)) if w
        }
        return widths

    def _tokens_inside(self, path: str) -> bool:
        """Whether the block around ``path`` works on channels-last tensors (linears or norms over the last axis)."""
        block = next((b for b in self._ancestors(path) if b in self._numbers), path)
        module = self.module(block)
        norms = [m for _, m in inner_modules(module) if isinstance(m, nn.LayerNorm)]
        convs = any(is_conv(m) for _, m in inner_modules(module))
        return not convs and bool(norms)

    def _grid(self, length: int) -> tuple[int, int] | None:
        grid = getattr(getattr(self.model, "patch_embed", None), "grid_size", None)
        if grid is not None and grid[0] * grid[1] == length:
            return int(grid[0]), int(grid[1])
        return None

    @staticmethod
    def _ancestors(path: str) -> Iterator[str]:
        """The path itself, then everything above it, innermost first."""
        while path:
            yield path
            path = path.rpartition(".")[0]


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
