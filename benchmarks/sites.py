"""What the anatomy finds on every architecture of timm, and whether a Conv-Adapter can be attached there.

    python benchmarks/sites.py [--filter swin] [--models resnet50,vit_small_patch16_224] [--json]

One row per file of timm.models: the variant with the fewest parameters (building them all to count takes
some minutes), or the models that are named. Everything runs on the meta device, so no weights and no memory
are needed. Columns: stages and blocks; spatial convolutions in all, and how many of the sites the dry run
saw running; the classifier; whether addresses are the same in the two kinds of feature extractor; what
``attach(model, "conv-adapter", num_classes=7)`` placed and its share of the parameters, or why it refused.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import json
import sys
import warnings
from collections.abc import Iterator

import timm
import torch
from torch import nn

import torchgraft as tg
from torchgraft.core.placements import Train


@dataclasses.dataclass(frozen=True)
class Row:
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
    result: str

    @property
    def fired(self) -> str:
        return "no dry run" if self.fires is None else f"{self.fires}/{self.sites}"


def smallest(pattern: str) -> Iterator[tuple[str, str]]:
    """(file, variant with the fewest parameters) for every file of timm.models that ``pattern`` is part of."""
    for file in timm.list_modules():
        if pattern not in file:
            continue
        sizes = {}
        for name in timm.list_models(module=file):
            try:
                sizes[name] = sum(p.numel() for p in build(name).parameters())
            except Exception as error:
                print(f"{file}: {name} cannot be built: {error}", file=sys.stderr)
        if sizes:
            yield file, min(sizes, key=sizes.__getitem__)


def build(name: str, **options: object) -> nn.Module:
    with torch.device("meta"):
        return timm.create_model(name, **options).eval()


def inspect(file: str, name: str) -> Row:
    model = build(name)
    found = tg.anatomy(model)
    spatial = [s for s in found.sites if s.role in ("spatial_conv", "downsample")]
    fires = None if found.trace is None else sum(bool(s.fires) for s in found.sites)
    twins = compare(found, name)
    attached, result = attach(model)
    return Row(
        file, name, len(found.stages), len(found.blocks), len(spatial), len(found.sites), fires, found.stem,
        found.head, twins, attached, result,
    )  # fmt: skip


def attach(model: nn.Module) -> tuple[bool, str]:
    total = sum(p.numel() for p in model.parameters())
    try:
        adapter = tg.attach(model, "conv-adapter", num_classes=7)
    except (tg.GraftError, RuntimeError, NotImplementedError) as error:
        return False, f"{type(error).__name__}: {error}"
    kinds = collections.Counter(
        site.role for (prefix, p), site in zip(adapter.placements, adapter.sites, strict=False)
        if prefix != "head" and not isinstance(p, Train)
    )  # fmt: skip
    placed = " + ".join(f"{count} {role}" for role, count in kinds.items())
    return True, f"{placed}, {100 * adapter.num_parameters() / total:.1f} %"


def compare(whole: tg.Anatomy, name: str) -> str:
    """Whether the modules of both feature extractors have addresses of the classifier with the same tensors."""
    known = {whole.address(path): shapes(module) for path, module in {"": whole.model, **whole.modules}.items()}
    results = []
    for label, options in (("list", {}), ("getter", {"feature_cls": "getter"})):
        try:
            twin = tg.anatomy(build(name, features_only=True, **options))
        except (RuntimeError, TypeError, AttributeError, AssertionError, ValueError):
            continue
        wrong = [p for p, m in twin.modules.items() if differ(shapes(m), known.get(twin.address(p)))]
        results.append(f"{label} {f'{len(wrong)} differ, such as {wrong[0]}' if wrong else 'same'}")
    return ", ".join(results) or "none"


def differ(here: dict[str, tuple[int, ...]], there: dict[str, tuple[int, ...]] | None) -> bool:
    """Whether a module's tensors are not those at its address; a twin may lack some, as its class token."""
    return bool(here) and (there is None or any(there.get(name) != shape for name, shape in here.items()))


def shapes(module: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(p.shape) for name, p in module._parameters.items() if p is not None}


def table(rows: list[Row]) -> Iterator[str]:
    heads = ("model", "stages", "blocks", "spatial", "sites run", "head", "feature extractors", "conv-adapter")
    cells = [
        (r.model, str(r.stages), str(r.blocks), str(r.spatial), r.fired, r.head or "-", r.twins, r.result) for r in rows
    ]
    widths = [max(len(line[i]) for line in (heads, *cells)) for i in range(len(heads))]
    for line in (heads, *cells):
        yield "  ".join(f"{cell:<{width}}" for cell, width in zip(line, widths, strict=True)).rstrip()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--filter", default="", metavar="TEXT", help="only files whose name holds this")
    parser.add_argument("--models", default="", metavar="A,B", help="these models instead of the smallest ones")
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    named = [("", name) for name in options.models.split(",") if name]
    rows = []
    for file, name in named or smallest(options.filter):
        print(f"{name} ...", file=sys.stderr, flush=True)
        rows.append(inspect(file, name))
    failed = [r for r in rows if not r.attached]
    if not options.json:
        print("\n".join(table(rows)))
        print(f"{len(rows) - len(failed)} of {len(rows)} models take a Conv-Adapter")
        return 0
    print(json.dumps({"benchmark": "sites", "timm": timm.__version__, "rows": [dataclasses.asdict(r) for r in rows]}))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
