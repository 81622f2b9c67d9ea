"""``torchgraft list``: what there is to choose from."""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Callable
from typing import Annotated, Any

import typer

from .console import emit_json, next_command, note, results_only, say, table, working
from .options import AsJson

EXAMPLES = """\
torchgraft list methods
torchgraft list backbones convnext
torchgraft list sites resnet50            where adapters can go in a model
torchgraft list samples                   data sets that need no download
torchgraft list assets --json"""

_FEW = 30
"""So many backbones are built, without memory for their weights, to count what nothing says about them."""


class Kind(enum.StrEnum):
    """What can be listed."""

    methods = "methods"
    backbones = "backbones"
    assets = "assets"
    samples = "samples"
    recipes = "recipes"
    sites = "sites"


def run(
    kind: Annotated[Kind, typer.Argument(metavar="WHAT", help=f"{', '.join(Kind)}.")],
    pattern: Annotated[
        str | None, typer.Argument(metavar="FILTER", help="Part of the names to show; for sites: a backbone.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """List methods, backbones, samples, sites and more.

    The sites of a model are the places where an adapter can go; they are found without its weights.
    """
    with results_only(as_json):
        rows = _LISTERS[kind](pattern)
    if as_json:
        emit_json(rows)
        return
    if not rows:
        note(f"no {kind.value} match {pattern!r}")
        return
    shown = [_SHOWN[kind](row) for row in rows]
    table(list(shown[0]), [list(row.values()) for row in shown])
    if kind is Kind.methods:
        _say_where_methods_do_not_apply(rows)
        next_command("What one would add to a backbone:", "torchgraft plan BACKBONE --method NAME")
    elif kind is Kind.backbones and len(rows) > _FEW:
        note(f"figures of timm's models are shown where a FILTER leaves {_FEW} names or fewer")
    elif kind is Kind.samples:
        next_command("Train on one of them:", "torchgraft train sample:NAME")
    elif kind is Kind.sites:
        next_command("Adapt some of them only:", f"torchgraft train DATA --backbone {pattern} -o include=ADDRESS")


def _methods(pattern: str | None) -> list[dict[str, Any]]:
    import torchgraft as tg
    from torchgraft.bench.survey import survey

    methods = {name: m for name, m in sorted(tg.methods().items()) if pattern is None or pattern in name}
    with working("building every method on four backbones") as tick:
        facts = survey(methods, say=tick)
    rows = []
    for (name, method), found in zip(methods.items(), facts, strict=True):
        fields = dataclasses.fields(method)  # type: ignore[arg-type]
        options = {f.name: _default(f) for f in fields}
        rows.append({**dataclasses.asdict(found), "name": name, "options": options})
    return rows


def _say_where_methods_do_not_apply(rows: list[dict[str, Any]]) -> None:
    missing = [(r["name"], b, n) for r in rows for b, n in r["parameters"].items() if isinstance(n, str)]
    if missing:
        say()
        say("Trainable parameters without a head; where a dash stands the method does not apply:")
        table(["name", "backbone", "why"], missing)


def _method_row(row: dict[str, Any]) -> dict[str, Any]:
    """A method as a row of the table; why it does not apply somewhere stands in the JSON document."""
    sizes = {b: f"{n:,}" if isinstance(n, int) else "-" for b, n in row["parameters"].items()}
    return {
        "name": row["name"],
        "paper": row["paper"],
        "placements": ", ".join(row["placements"]),
        "merges": row["merge"],
        "layers": ", ".join(row["layers"]),
        **sizes,
    }


def _backbones(pattern: str | None) -> list[dict[str, Any]]:
    from torchgraft.backbones import list_backbones
    from torchgraft.backbones.facts import Facts, counted_facts, published_facts

    names = list_backbones(pattern)
    facts = {name: published_facts(name) for name in names}
    if len(names) <= _FEW:
        with working("counting parameters and operations") as tick:
            for name in names:
                tick(name)
                facts[name] = facts[name] or counted_facts(name)
    return [dataclasses.asdict(facts[name] or Facts(name)) for name in names]


def _backbone_row(row: dict[str, Any]) -> dict[str, Any]:
    """A backbone as a row of the table."""
    data = f" ({row['data']})" if row["data"] else ""
    return {
        "name": row["name"],
        "parameters": f"{row['parameters']:,}" if row["parameters"] else "",
        "GMACs": f"{row['gmacs']:.2f} @{row['side']}" if row["gmacs"] else "",
        "top-1": f"{row['top1']:.1f}{data}" if row["top1"] else "",
        "channels": " ".join(map(str, row["channels"])),
        "strides": " ".join(map(str, row["strides"])),
        "runs with": row["runs_with"],
    }


def _assets(pattern: str | None) -> list[dict[str, Any]]:
    from torchgraft.backbones import list_assets

    return [dataclasses.asdict(asset) for asset in list_assets() if pattern is None or pattern in asset.name]


def _samples(pattern: str | None) -> list[dict[str, Any]]:
    from torchgraft.data import list_samples

    return [dataclasses.asdict(sample) for sample in list_samples() if pattern is None or pattern in sample.name]


def _recipes(pattern: str | None) -> list[dict[str, Any]]:
    from torchgraft.recipes import list_recipes, load_recipe

    names = [name for name in list_recipes() if pattern is None or pattern in name]
    return [{"name": name, "settings": load_recipe(name)} for name in names]


def _sites(model: str | None) -> list[dict[str, Any]]:
    import torchgraft as tg
    from torchgraft.backbones import create_backbone
    from torchgraft.errors import GraftError

    if model is None:
        raise GraftError("list sites needs the name of a model, for example: torchgraft list sites resnet50")
    names = ("address", "path", "role", "kind", "in_channels", "out_channels", "kernel")
    sites = tg.anatomy(create_backbone(model, pretrained=False)).sites
    return [{name: getattr(site, name) for name in names} for site in sites]


_LISTERS: dict[Kind, Callable[[str | None], list[dict[str, Any]]]] = {
    Kind.methods: _methods,
    Kind.backbones: _backbones,
    Kind.assets: _assets,
    Kind.samples: _samples,
    Kind.recipes: _recipes,
    Kind.sites: _sites,
}

_SHOWN: dict[Kind, Callable[[dict[str, Any]], dict[str, Any]]] = {
    Kind.methods: _method_row,
    Kind.backbones: _backbone_row,
    Kind.assets: lambda row: {
        "name": row["name"],
        "kind": row["kind"],
        "size": f"{row['megabytes']} MB",
        "licence": row["licence"],
        "installed": "yes" if row["installed"] else row["how_to_get"],
    },
    Kind.samples: lambda row: {
        "name": f"sample:{row['name']}",
        "classes": len(row["classes"]),
        "what": row["title"],
        "installed": "yes" if row["installed"] else row["how_to_get"],
    },
    Kind.recipes: lambda row: {"name": row["name"], "settings": _settings(row["settings"])},
    Kind.sites: lambda row: {
        **{name: row[name] for name in ("address", "role", "kind")},
        "channels": "" if row["in_channels"] is None else f"{row['in_channels']} -> {row['out_channels']}",
        "kernel": "x".join(map(str, row["kernel"] or ())),
        "path": row["path"],
    },
}
"""How a row of the JSON document looks in the table."""


def _settings(values: dict[str, Any]) -> str:
    return " ".join(f"{name}={value}" for name, value in values.items())


def _default(field: dataclasses.Field[Any]) -> Any:
    if field.default is not dataclasses.MISSING:
        return field.default
    return field.default_factory() if field.default_factory is not dataclasses.MISSING else None
