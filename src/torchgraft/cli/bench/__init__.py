"""``torchgraft bench``: one file per command, each a thin face of the measuring in ``torchgraft.bench``."""

from __future__ import annotations

HELP = """Measure what adapters cost in bytes, operations and time.

Every command prints one table; with --json, one line of JSON on standard output. Bytes and operations are exact
and the same in every run; times are medians of alternating runs and move by some per cent. With --check the exit
code is 1 when a goal is missed."""

COMMANDS: tuple[str, ...] = (
    "memory",
    "floor",
    "layers",
    "overhead",
    "compat",
    "sites",
    "compile",
    "step",
    "peft",
    "delta",
    "equal",
    "prefix",
)
"""Names of the commands in the order of the help; each is the module beside this file with ``run`` and ``EXAMPLES``."""

EXAMPLES = """\
torchgraft bench memory resnet50                       bytes of every method, measured
torchgraft bench memory resnet50 --fake                the same bytes, counted without data
torchgraft bench step resnet50 --rounds 7              time of a training step against full fine-tuning
torchgraft bench peft vit_small_patch16_224            against LoRA of HF peft on the same layers
torchgraft bench equal resnet50 conv-adapter --check   are the gradients the same, bit for bit?"""
