"""What the anatomy finds on every architecture of timm, and whether a Conv-Adapter can be attached there.

Models stand on the meta device, so no weights and no memory are needed.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Callable, Iterable, Iterator

import timm
import torch
from torch import nn

from ..core.adapter import Adapter, attach
from ..core.anatomy import Anatomy
from ..core.placements import Train
from ..errors import GraftError, nearest
from .goals import Goal

METHOD = "conv-adapter"
CLASSES = 7


@dataclasses.dataclass(frozen=True)
class Row:
    """What was found on one model.

    Attributes:
        file: File of ``timm.models``; empty for a model that was named.
        model: Name of the model.
        stages: Number of stages.
        blocks: Number of blocks.
        spatial: Convolutions with a kernel larger than 1 outside the stem.
        sites: Sites in all.
        fires: How many of them run in the dry run; None when the model accepted no guessed input.
        stem: Path of the first layer.
        head: Path of the classifier.
        twins: Whether addresses are the same in timm's two kinds of feature extractor.
        attached: Whether the method could be attached.
        fallbacks: Placements that act through the weight of a layer that is never called: its parent reads the weight.
        silent: Placements at layers that never run and whose weight nobody reads, so that they would train nothing.
        result: What was attached and its share of the parameters, or why it was refused.
    """

    file: str
    model: str
    stages: int
    blocks: int
    spatial: int
    sites: int
    fires: int | None
    stem: str | None
    head: str | None
    twins: str
    attached: bool
    fallbacks: int
    silent: int
    result: str

    @property
    def fired(self) -> str:
        """Sites that run, of all."""
        return "no dry run" if self.fires is None else f"{self.fires}/{self.sites}"


def measure(
    models: Iterable[str] = (),
    pattern: str = "",
    *,
    method: str = METHOD,
    say: Callable[[str], None] = lambda name: None,
) -> list[Row]:
    """Look at models one by one.

    Args:
        models: Names; empty: of every file of ``timm.models`` the variant with the fewest parameters.
        pattern: Only files whose name holds this.
        method: What is attached.
        say: Called with the name of each model.
    """
    rows = []
    for file, name in [("", name) for name in models] or smallest(pattern):
        say(name)
        rows.append(inspect(file, name, method))
    return rows


def goals(rows: list[Row]) -> list[Goal]:
    """Whatever is attached runs."""
    return [Goal("placements that never run", sum(r.silent for r in rows), 0)]


def smallest(pattern: str) -> Iterator[tuple[str, str]]:
    """File and variant with the fewest parameters, for every file of ``timm.models`` that ``pattern`` is part of."""
    for file in timm.list_modules():
        sizes = {}
        for name in timm.list_models(module=file) if pattern in file else ():
            try:
                sizes[name] = sum(p.numel() for p in build(name).parameters())
            except Exception:
                continue  # some variants need packages that are not installed
        if sizes:
            yield file, min(sizes, key=sizes.__getitem__)


def build(name: str, **options: object) -> nn.Module:
    """A timm model without data.

    Raises:
        GraftError: timm has no such model.
    """
    if not timm.is_model(name):
        raise GraftError(f"model {name!r}: {nearest(name, timm.list_models())}")
    with torch.device("meta"):
        return timm.create_model(name, **options).eval()  # type: ignore[arg-type]


def inspect(file: str, name: str, method: str = METHOD) -> Row:
    """Look at one model and attach to it."""
    model = build(name)
    found = Anatomy(model)
    spatial = [s for s in found.sites if s.role in ("spatial_conv", "downsample")]
    fires = None if found.trace is None else sum(bool(s.fires) for s in found.sites)
    twins = same_addresses(found, name)
    total = sum(p.numel() for p in model.parameters())
    fallbacks = silent = 0
    try:
        adapter = attach(model, method, num_classes=CLASSES)
        result, attached = _placed(adapter, total), True
        fallbacks, silent = _not_called(adapter, found)
    except (GraftError, RuntimeError, NotImplementedError) as error:
        result, attached = f"{type(error).__name__}: {error}", False
    return Row(
        file,
        name,
        len(found.stages),
        len(found.blocks),
        len(spatial),
        len(found.sites),
        fires,
        found.stem,
        found.head,
        twins,
        attached,
        fallbacks,
        silent,
        result,
    )


def same_addresses(whole: Anatomy, name: str) -> str:
    """Whether the modules of both feature extractors have addresses of the classifier with the same tensors."""
    known = {whole.address(path): _shapes(module) for path, module in {"": whole.model, **whole.modules}.items()}
    results = []
    for label, options in (("list", {}), ("getter", {"feature_cls": "getter"})):
        try:
            twin = Anatomy(build(name, features_only=True, **options))
        except (RuntimeError, TypeError, AttributeError, AssertionError, ValueError):
            continue  # timm offers no such extractor for this model
        wrong = [p for p, m in twin.modules.items() if _differ(_shapes(m), known.get(twin.address(p)))]
        results.append(f"{label} {f'{len(wrong)} differ, such as {wrong[0]}' if wrong else 'same'}")
    return ", ".join(results) or "none"


def _placed(adapter: Adapter, total: int) -> str:
    kinds = collections.Counter(
        site.role
        for (prefix, p), site in zip(adapter.placements, adapter.sites, strict=False)
        if prefix != "head" and not isinstance(p, Train)
    )
    placed = " + ".join(f"{count} {role}" for role, count in kinds.items())
    return f"{placed}, {100 * adapter.num_parameters() / total:.1f} %"


def _not_called(adapter: Adapter, anatomy: Anatomy) -> tuple[int, int]:
    """Placements at layers that are never called: those that act through the weight, and those that cannot."""
    trace = anatomy.trace
    if trace is None:
        return 0, 0
    homes = [p for _, p in adapter.placements if p.home and p.kind != "stats" and not trace.fired(p.home)]
    through = sum(p.functional for p in homes)
    return through, len(homes) - through


def _differ(here: dict[str, tuple[int, ...]], there: dict[str, tuple[int, ...]] | None) -> bool:
    """Whether a module's tensors are not those at its address; a twin may lack some, as its class token."""
    return bool(here) and (there is None or any(there.get(name) != shape for name, shape in here.items()))


def _shapes(module: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(p.shape) for name, p in module._parameters.items() if p is not None}
