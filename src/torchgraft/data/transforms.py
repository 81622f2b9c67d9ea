"""From a backbone's own data configuration to the transforms of training and evaluation.

========  ==============================================  =====================================
augment   training                                        evaluation
========  ==============================================  =====================================
light     whole picture to the square, shifted by up to   whole picture to the square
          1/14 of the side, mirrored if that keeps the
          label
none      whole picture to the square                     whole picture to the square
standard  timm's random resized crop (8-100 % of the      the backbone's own: shorter side, then
          area), mirrored if that keeps the label         the centre
========  ==============================================  =====================================

Light is the default because adapters are trained on few pictures, often small ones, in which the border
matters (counting, defects): a crop of 8 % of the area would change the label, and the centre crop would hide
an eighth of every picture. Scaling is bicubic, up as well as down, unless the backbone asks for something
else.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, cast, get_args

import timm.data
from PIL import Image
from timm.data.transforms import str_to_interp_mode
from timm.models import get_model_input_config
from torch import Tensor, nn
from torchvision import transforms

from ..errors import GraftError, nearest

Augment = Literal["light", "standard", "none"]

PictureTransform = Callable[[Image.Image], Tensor]

_EVAL_KEYS = ("input_size", "interpolation", "mean", "std", "crop_pct", "crop_mode")

_SHIFT = 14
"""Light shifts by up to 1/14 of the side: the setting that the sample tasks' baselines were measured with."""


@dataclass(frozen=True)
class Transforms:
    """The two transforms of a task and the plain values they were made from.

    Attributes:
        train: RGB picture -> float tensor (3, H, W), random.
        eval: RGB picture -> float tensor (3, H, W), the same every time.
        config: JSON values; :func:`eval_transform_from` makes ``eval`` from them again.
    """

    train: PictureTransform
    eval: PictureTransform
    config: dict[str, Any]


def transforms_for(
    model: nn.Module | Mapping[str, Any],
    *,
    image_size: int | None = None,
    mirror: bool = True,
    augment: Augment = "light",
) -> Transforms:
    """The transforms that fit a backbone.

    Args:
        model: The backbone, or its data configuration (``pretrained_cfg``). A model without one gets
            ImageNet's mean and standard deviation, at 224 pixels or its own ``config.image_size``.
        image_size: Side of the square input in pixels; default the backbone's own.
        mirror: Whether training may mirror pictures left-right.
        augment: See the table in this module's description.

    Raises:
        GraftError: An unknown ``augment``, or an image size that the backbone cannot take.
    """
    if augment not in get_args(Augment):
        raise GraftError(f"unknown augment {augment!r}; {nearest(str(augment), get_args(Augment))}")
    config = _data_config(model, image_size)
    if augment != "standard":
        config |= {"crop_pct": 1.0, "crop_mode": "squash"}
    config |= {"augment": augment, "mirror": mirror}
    evaluate = eval_transform_from(config)
    if augment == "light":
        train = _light(config)
    elif augment == "standard":
        train = cast(PictureTransform, _timm(config, training=True))
    else:
        train = evaluate
    return Transforms(train, evaluate, config)


def eval_transform_from(config: Mapping[str, Any]) -> PictureTransform:
    """Rebuild the evaluation transform from the ``config`` of :class:`Transforms`, as it is kept in a task
    file.

    Raises:
        GraftError: A value is missing.
    """
    missing = [key for key in _EVAL_KEYS if key not in config]
    if missing:
        raise GraftError(f"the transform's configuration lacks {', '.join(missing)}; it needs {', '.join(_EVAL_KEYS)}")
    return cast(PictureTransform, _timm(config, training=False))


def _timm(config: Mapping[str, Any], *, training: bool) -> Any:
    extra: dict[str, Any] = {"crop_pct": config["crop_pct"], "crop_mode": config["crop_mode"]}
    if training:
        extra = {"hflip": 0.5 if config["mirror"] else 0.0, "color_jitter": None}
    return timm.data.create_transform(
        input_size=tuple(config["input_size"]),
        is_training=training,
        interpolation=config["interpolation"],
        mean=tuple(config["mean"]),
        std=tuple(config["std"]),
        **extra,
    )


def _light(config: Mapping[str, Any]) -> PictureTransform:
    size = tuple(config["input_size"][1:])
    steps: list[Any] = [
        transforms.Resize(size, interpolation=str_to_interp_mode(config["interpolation"])),
        transforms.RandomCrop(size, padding=max(1, min(size) // _SHIFT), padding_mode="reflect"),
    ]
    if config["mirror"]:
        steps.append(transforms.RandomHorizontalFlip())
    steps += [transforms.ToTensor(), transforms.Normalize(config["mean"], config["std"])]
    return transforms.Compose(steps)


def _data_config(model: nn.Module | Mapping[str, Any], image_size: int | None) -> dict[str, Any]:
    if isinstance(model, nn.Module):
        source = dict(getattr(model, "pretrained_cfg", None) or _foreign_config(model))
    else:
        source = dict(model)
    found = timm.data.resolve_data_config(pretrained_cfg=source)
    channels, height, width = found["input_size"]
    fixed = None
    if isinstance(model, nn.Module) and hasattr(model, "_traits"):
        current = get_model_input_config(model)
        height, width = current["input_size"][1:]
        fixed = (height, width) if current["fixed_input_size"] else None
    if channels != 3:
        raise GraftError(f"the backbone takes {channels} channels; pictures are read as RGB, so it must take 3")
    if image_size is not None:
        if image_size < 1:
            raise GraftError(f"image_size={image_size}: the side of the input in pixels must be positive")
        if fixed is not None and fixed != (image_size, image_size):
            raise GraftError(
                f"image_size={image_size}, but the backbone was built for {fixed[0]}x{fixed[1]} pixels; "
                f"build it with create_backbone(..., image_size={image_size})"
            )
        height = width = image_size
    return {
        "input_size": [3, int(height), int(width)],
        "interpolation": found["interpolation"],
        "mean": [float(v) for v in found["mean"]],
        "std": [float(v) for v in found["std"]],
        "crop_pct": float(found["crop_pct"]),
        "crop_mode": found["crop_mode"],
    }


def _foreign_config(model: nn.Module) -> dict[str, Any]:
    """What a model that is not timm's says about its input: transformers keeps ``config.image_size``."""
    size = getattr(getattr(model, "config", None), "image_size", None)
    if size is None:
        return {"input_size": (3, 224, 224)}
    height, width = (size, size) if isinstance(size, int) else tuple(size)
    return {"input_size": (3, height, width)}
