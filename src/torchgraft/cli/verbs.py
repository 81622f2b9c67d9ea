"""The verbs put together, the options that all of them share, and what becomes of an error."""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import Annotated, Any

import typer
from rich.markup import escape
from typer.core import TyperCommand, TyperGroup

from . import bench, demo, doctor, evaluate, inspect, listing, plan, predict, train
from .console import TERMINAL
from .failures import report_failure

VERBS = (
    ("demo", demo),
    ("train", train),
    ("eval", evaluate),
    ("predict", predict),
    ("plan", plan),
    ("list", listing),
    ("inspect", inspect),
    ("doctor", doctor),
    ("bench", bench),
)
"""Name of a verb and the module with its function ``run`` and its ``EXAMPLES``, in the order of the help.

A module with ``COMMANDS`` in place of ``run`` is a group: the verbs are the modules beside it with these names.
"""

EXAMPLES = """\
torchgraft demo                        see it work on real weights and pictures
torchgraft train FOLDER --backbone tf_efficientnet_lite0 --method conv-adapter
torchgraft predict runs/NAME/adapter picture.jpg
torchgraft list methods                what can be attached
torchgraft doctor                      is everything in place?
torchgraft VERB --help                 options and examples of one verb"""


class CommandGroup(TyperGroup):
    """A group of verbs; its examples keep their lines in the help."""

    def format_epilog(self, ctx: Any, formatter: Any) -> None:
        """Write the examples line by line (the base class would join them into paragraphs)."""
        _write_examples(self.epilog, formatter)


class VerbGroup(CommandGroup):
    """The verbs as a group that turns exceptions into one line and an exit code."""

    def invoke(self, ctx: Any) -> Any:
        """Run the chosen verb; failures leave through :func:`.failures.report_failure`."""
        try:
            return super().invoke(ctx)
        except (KeyboardInterrupt, Exception) as error:
            code = report_failure(error, debug=bool(ctx.params.get("debug")))
            if code is None:
                raise
            raise typer.Exit(code) from None


class VerbCommand(TyperCommand):
    """One verb; its examples keep their lines in the help."""

    def format_epilog(self, ctx: Any, formatter: Any) -> None:
        """Write the examples line by line (the base class would join them into paragraphs)."""
        _write_examples(self.epilog, formatter)


def _group(kind: type[TyperGroup], **settings: Any) -> typer.Typer:
    return typer.Typer(
        cls=kind,
        no_args_is_help=True,
        # Boxes and colours are for people at a terminal; a pipe or a log file gets plain lines.
        rich_markup_mode="rich" if TERMINAL else None,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["--help", "-h"]},
        **settings,
    )


app = _group(VerbGroup, name="torchgraft")


def main() -> None:
    """Run the command line with the arguments of this process."""
    app(prog_name="torchgraft")


def _examples(text: str) -> str:
    lines = "Examples:\n\n" + "\n".join("  " + line for line in text.splitlines())
    return escape(lines) if TERMINAL else lines


def _reflowed(docstring: str | None) -> str:
    """A docstring with one line for each paragraph, so that it fills the window whatever its width."""
    return "\n\n".join(" ".join(part.split()) for part in (docstring or "").split("\n\n"))


def _write_examples(epilog: str | None, formatter: Any) -> None:
    if epilog:
        formatter.write_paragraph()
        formatter.write(epilog.replace("\n\n", "\n") + "\n")


def _show_version(value: bool) -> None:
    if value:
        from ..version import VERSION

        sys.stdout.write(f"torchgraft {VERSION}\n")
        raise typer.Exit


@app.callback(epilog=_examples(EXAMPLES))
def _options(
    debug: Annotated[bool, typer.Option("--debug", help="Show the full trace of an error.")] = False,
    version: Annotated[
        bool,
        typer.Option("--version", help="Show the version and leave.", callback=_show_version, is_eager=True),
    ] = False,
) -> None:
    """Adapt one frozen, pretrained vision backbone to many tasks by training a few per cent of it."""


def _register(group: typer.Typer, name: str, module: ModuleType) -> None:
    """Add the verb that ``module`` holds, or the group of verbs that its ``COMMANDS`` name."""
    epilog = _examples(module.EXAMPLES)
    if not hasattr(module, "COMMANDS"):
        group.command(name, cls=VerbCommand, help=_reflowed(module.run.__doc__), epilog=epilog)(module.run)
        return
    inner = _group(CommandGroup, help=_reflowed(module.HELP), epilog=epilog)
    for command in module.COMMANDS:
        _register(inner, command, import_module(f"{module.__name__}.{command}"))
    group.add_typer(inner, name=name)


for _name, _module in VERBS:
    _register(app, _name, _module)
