"""``torchgraft plan``: what a method would add to a backbone, before anything is trained."""

from __future__ import annotations

import shlex
from typing import Annotated

import typer

from .console import emit_json, next_command, results_only, say
from .options import AsJson, Backbone, ImageSize

EXAMPLES = """\
torchgraft plan convnext_tiny --method conv-adapter
torchgraft plan resnet50 --method "conv-adapter[reduction=8]" --num-classes 37
torchgraft plan tf_efficientnet_lite0 --method bitfit --image-size 96 --json
torchgraft plan vit_small_patch16_224 --method lora --lean recompute --batch 32"""


def run(
    backbone: Backbone,
    method: Annotated[
        str, typer.Option("--method", metavar="METHOD", help="Method with options, as in NAME[KEY=VALUE].")
    ] = "conv-adapter",
    image_size: ImageSize = None,
    num_classes: Annotated[
        int | None, typer.Option("--num-classes", min=1, metavar="K", help="Count a head for K classes too.")
    ] = None,
    lean: Annotated[
        str,
        typer.Option(
            "--lean",
            metavar="LEVEL",
            help="Level of memory saving to show: exact, recompute, checkpoint, compact, off.",
        ),
    ] = "exact",
    batch: Annotated[int, typer.Option("--batch", min=1, metavar="N", help="Images in a batch, for memory.")] = 1,
    as_json: AsJson = False,
) -> None:
    """Show what a method would add to BACKBONE.

    Sites, parameters, operations and memory, before anything is trained. No weights are needed.
    """
    with results_only(as_json):
        import torchgraft as tg
        from torchgraft.backbones import create_backbone

        model = create_backbone(backbone, pretrained=False, image_size=image_size)
        plan = tg.plan(model, method, input_size=image_size, num_classes=num_classes, lean=lean, batch=batch)
    if as_json:
        emit_json(plan.to_dict())
        return
    say(str(plan))
    level = [] if plan.lean == "exact" else ["--lean", plan.lean]
    command = shlex.join(["torchgraft", "train", "FOLDER", "--backbone", backbone, "--method", method, *level])
    next_command("Train it on a folder of images:", command)
