"""Options that several verbs share, so that they look and read the same everywhere."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document and nothing else.")]
Backbone = Annotated[str, typer.Argument(metavar="BACKBONE", help="Name of a timm or torchgraft backbone.")]
Data = Annotated[str, typer.Argument(metavar="DATA", help="Folder of class folders, CSV file, or sample:NAME.")]
AdapterDir = Annotated[Path, typer.Argument(metavar="ADAPTER_DIR", help="Adapter folder, such as runs/NAME/adapter.")]
Weights = Annotated[
    Path | None,
    typer.Option("--weights", metavar="FILE", help="The backbone's weights; default: where they came from."),
]
Device = Annotated[str | None, typer.Option("--device", metavar="NAME", help="auto (the default), cpu, cuda or mps.")]
ImageSize = Annotated[
    int | None,
    typer.Option("--image-size", metavar="PX", min=8, help="Side of the square input; default: the backbone's."),
]
