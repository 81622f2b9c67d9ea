"""Write the reference pages that the library can answer itself: command line, support table and our backbones.

Run by ``make docs`` before the site is built. What it writes is kept in the repository, so that the pages can
be read there too.
"""

from __future__ import annotations

import contextlib
import importlib
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import timm
import torch
from timm.layers import Conv2dSame, ScaledStdConv2d, StdConv2d
from torch import Tensor, nn
from typer.main import get_command

import torchgraft as tg
from torchgraft.backbones.facts import published_facts
from torchgraft.backbones.timm_api import ARCHITECTURES
from torchgraft.core.layers import ConvGeometry, is_conv, kind_of
from torchgraft.core.placements import Affine, Parallel, Placement, Sequential, Train, WeightDelta

REFERENCE = Path(__file__).parent / "reference"
WIDTH = 96  # columns of a code block on a page of the site

# One layer of every kind that a backbone of timm or torchvision is made of.
LAYERS: tuple[nn.Module, ...] = (
    nn.Conv2d(8, 8, 3),
    nn.Conv2d(8, 8, 3, groups=2),
    nn.Conv2d(8, 8, 3, groups=8),
    nn.Conv2d(8, 8, 3, dilation=2),
    nn.Conv2d(8, 8, 3, padding=1, padding_mode="reflect"),
    Conv2dSame(8, 8, 3, stride=2),
    StdConv2d(8, 8, 3),
    ScaledStdConv2d(8, 8, 3),
    nn.Conv1d(8, 8, 3),
    nn.Conv3d(8, 8, 3),
    nn.ConvTranspose2d(8, 8, 2, stride=2),
    nn.Linear(8, 8),
    nn.MultiheadAttention(8, 2),
    nn.Embedding(8, 8),
    nn.BatchNorm2d(8),
    nn.LayerNorm(8),
    nn.GroupNorm(2, 8),
)
# The placements that act at single layers; the others belong to blocks, sequences or the image.
PLACEMENTS = (Parallel, Sequential, Affine, WeightDelta, Train)


def main() -> None:
    """Write the pages."""
    (REFERENCE / "cli.md").write_text(command_line(), encoding="utf-8")
    (REFERENCE / "support.md").write_text(support(), encoding="utf-8")
    (REFERENCE / "backbones.md").write_text(backbones(), encoding="utf-8")


def command_line() -> str:
    """The page of the command line: the help of torchgraft and of every verb."""
    parts = ["# Command line\n", "What `torchgraft --help` and `torchgraft VERB --help` print.\n"]
    for verb, text in _helps():
        lines = "\n".join(line.rstrip() for line in text.strip().splitlines())
        parts += [f"## {verb}\n"] if verb else []
        parts.append(f"```text\n{lines}\n```\n")
    return "\n".join(parts)


def support() -> str:
    """The page with layer kinds as rows, methods and placements as columns."""
    tried = {name: [adapts(name, layer) for layer in LAYERS] for name in tg.methods()}
    said = {p.__name__: [says(p, layer) for layer in LAYERS] for p in PLACEMENTS}
    return f"""# Layers

Written by `make docs`, which tries every method at every kind of layer.

## Methods

*yes*: the method was attached to a small network around such a layer and trained for two steps; the output
changed, every tensor of the method got a gradient, and detaching gave the old output back, bit for bit. *folds*:
it was also merged into the layer, within the tolerance. -: it does not act there. Methods that act elsewhere (on
the image, beside the network, on the head) have no column.

{_table({name: cells for name, cells in tried.items() if set(cells) != {"-"}})}

## Placements

What a placement says that it can do at a layer: the building blocks for methods of your own.

{_table(said)}
"""


def backbones() -> str:
    """The page with the architectures that we register in timm, by size."""
    names = [
        name for module in ARCHITECTURES for name in importlib.import_module(f"torchgraft.backbones.{module}").PUBLISHED
    ]
    rows = "\n".join(map(_backbone, names))
    return f"""# Backbones that timm lacks

Written by `make docs`. Registered in timm by `import torchgraft`; every other model of timm is a backbone too. GMACs
count convolutions and linear layers, for one image of the size behind the @. Top-1 is what was published, on
ImageNet-1K, behind the dataset of the pretraining. The last two columns count what an adapter trains without a head:
`conv-adapter[reduction=4]` and `lora` as they come.

| name | parameters | GMACs | top-1 | channels | strides | Conv-Adapter | LoRA |
|---|---:|---:|---|---|---|---:|---:|
{rows}
"""


def _backbone(name: str) -> str:
    facts = published_facts(name)
    assert facts is not None
    with torch.device("meta"):
        model = timm.create_model(name).eval()
    sizes = [tg.plan(model, method).parameters for method in ("conv-adapter[reduction=4]", "lora")]
    top1 = "" if facts.top1 is None else f"{facts.top1:.1f}" + (f" ({facts.data})" if facts.data else "")
    cells = [f"`{name}`", f"{facts.parameters:,}", f"{facts.gmacs:.2f} @{facts.side}", top1]
    cells += [", ".join(map(str, facts.channels)), ", ".join(map(str, facts.strides))]
    return f"| {' | '.join([*cells, *(f'{size:,}' for size in sizes)])} |"


def adapts(method: str, layer: nn.Module) -> str:
    """What a method does that is attached to nothing but ``layer``: ``-``, ``yes`` or ``folds``."""
    torch.manual_seed(0)
    host = Host(layer).eval()
    image = torch.randn(2, 3, *[8] * host.dims)
    before = host(image)
    try:
        adapter = tg.attach(host, method, include="layer", example=((image,), {}))
    except tg.GraftError:
        return "-"
    acts = "layer" in [site.path for site in adapter.sites]
    tensors = list(adapter.parameters())
    reached: set[int] = set()
    for _ in range(2 if tensors else 0):  # what starts at zero lets gradient through from the second step on
        for tensor in tensors:
            tensor.grad = None
        (host(image).square().sum() + 0 * sum(t.sum() for t in tensors)).backward()
        reached |= {id(t) for t in tensors if t.grad is not None and t.grad.any()}
        with torch.no_grad():
            for tensor in tensors:
                tensor.sub_(tensor.grad, alpha=0.1)  # type: ignore[arg-type]
    changed = not torch.equal(host(image), before)
    folds = tg.merge(host, probe=image).complete
    tg.unmerge(host)
    tg.detach(host)
    works = acts and changed and len(reached) == len(tensors) and torch.equal(host(image), before)
    return ("folds" if folds else "yes") if works else "-"


def says(placement: type[Placement], layer: nn.Module) -> str:
    """What a placement answers about ``layer``: ``-``, ``yes`` or ``folds``."""
    answer = placement.supports(layer)
    return ("folds" if answer.merge else "yes") if answer.forward else "-"


class Host(nn.Module):
    """A stem, the layer, and a classifier."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.dims = ConvGeometry.of(layer).dims if is_conv(layer) else 2
        conv = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}[self.dims]
        self.stem, self.layer, self.head = conv(3, 8, 3, padding=1), layer, nn.Linear(8, 4)

    def forward(self, image: Tensor) -> Tensor:
        """(N, 3, *space) to (N, 4)."""
        x = self.stem(image)
        if is_conv(self.layer) or isinstance(self.layer, (nn.BatchNorm2d, nn.GroupNorm)):
            return self.head(torch.tanh(self.layer(x)).flatten(2).mean(2))
        tokens = x.flatten(2).transpose(1, 2)
        if isinstance(self.layer, nn.MultiheadAttention):
            tokens = self.layer(tokens, tokens, tokens)[0]
        elif isinstance(self.layer, nn.Embedding):
            tokens = self.layer(tokens.argmax(2))
        else:
            tokens = self.layer(tokens)
        return self.head(torch.tanh(tokens).mean(1))


def _table(columns: dict[str, list[str]]) -> str:
    """A column of answers per name, one row per layer of ``LAYERS``."""
    lines = [f"| layer | {' | '.join(f'`{name}`' for name in columns)} |", "|---" * (len(columns) + 1) + "|"]
    for layer, cells in zip(LAYERS, zip(*columns.values(), strict=True), strict=True):
        lines.append(f"| `{kind_of(layer)}` ({type(layer).__name__}) | {' | '.join(cells)} |")
    return "\n".join(lines)


def _helps() -> Iterator[tuple[str, str]]:
    """Verb (empty for torchgraft itself) and its help."""
    with contextlib.redirect_stdout(io.StringIO()):  # away from a terminal the help is plain text
        from torchgraft.cli import app
    program = get_command(app)
    settings = {**program.context_settings, "terminal_width": WIDTH, "max_content_width": WIDTH}
    context = program.context_class(program, info_name="torchgraft", **settings)
    yield "", program.get_help(context)
    yield from _helps_within(program, context)


def _helps_within(group: Any, context: Any) -> Iterator[tuple[str, str]]:
    """The verbs of a group, and those of the groups in it, by the words that call them."""
    called = context.command_path.split()[1:]
    for verb, command in group.commands.items():
        inner = command.context_class(command, info_name=verb, parent=context)
        yield " ".join([*called, verb]), command.get_help(inner)
        if hasattr(command, "commands"):
            yield from _helps_within(command, inner)


if __name__ == "__main__":
    main()
