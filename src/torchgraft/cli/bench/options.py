"""Options that several benchmark commands share, so that they look and read the same everywhere."""

from __future__ import annotations

from typing import Annotated

import typer

Model = Annotated[str, typer.Argument(metavar="MODEL", help="Name of a timm model; it gets random weights.")]
Method = Annotated[str, typer.Option("--method", metavar="METHOD", help="Method with options, as in NAME[KEY=VALUE].")]
Methods = Annotated[
    str | None,
    typer.Option("--methods", metavar="A,B", help="Methods to measure, or all; default: those that suit the model."),
]
Levels = Annotated[
    str | None,
    typer.Option("--levels", metavar="A,B", help="Of plain, folded, exact, recompute, checkpoint and compact."),
]
Batch = Annotated[int, typer.Option("--batch", metavar="N", min=1, help="Images in a batch.")]
Side = Annotated[int, typer.Option("--image-size", metavar="PX", min=8, help="Side of the square images.")]
DType = Annotated[str, typer.Option("--dtype", metavar="TYPE", help="fp32 or bf16: type of weights and images.")]
Device = Annotated[str, typer.Option("--device", metavar="NAME", help="cpu or cuda.")]
ChannelsLast = Annotated[bool, typer.Option("--channels-last", help="Keep images channel by channel in memory.")]
Rounds = Annotated[int, typer.Option("--rounds", metavar="N", min=1, help="Alternating rounds that are timed.")]
Check = Annotated[bool, typer.Option("--check", help="Leave with exit code 1 when a goal is missed.")]
CheckTimes = Annotated[bool, typer.Option("--check-times", help="As --check, and count goals on time too.")]
