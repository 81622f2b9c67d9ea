"""What a training run is told: one frozen, validated record, and how the sources of settings combine.

Settings come from three places, later ones winning: the recipe of the method, a recipe file named by the
user, and the options given by hand. A name that does not exist and a value of the wrong type are one-line
errors.
"""

from __future__ import annotations

import re
import types
import typing
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from ..errors import GraftError, nearest
from ..recipes import default_recipe, load_recipe

LeanLevel = Literal["exact", "recompute", "checkpoint", "compact", "off"]
"""How little a frozen layer keeps, named by what it promises; see :func:`torchgraft.attach`."""


class TrainConfig(BaseModel):
    """Settings of one classification run. Frozen; unknown names are refused.

    Without a recipe the defaults below apply; `configure` puts the method's recipe on top of them.

    Raises:
        GraftError: An unknown name or a value of the wrong type, in one line.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False)

    data: str = Field(description="folder, CSV file or sample:NAME that load_data understands")
    out: Path | None = Field(None, description="run folder to create; none: the next free runs/DATA-BACKBONE-METHOD")

    backbone: str = Field("tf_efficientnet_lite0", description="name of a timm or torchgraft backbone")
    weights: str | None = Field(None, description="weights file or bundled asset; none: the backbone's own")
    pretrained: bool = Field(True, description="start from pretrained weights (false: random, for tests)")

    method: str = Field("conv-adapter", description="method with options, as in conv-adapter[reduction=4]")
    include: str | list[str] | None = Field(None, description="sites to adapt; none: all the method wants")
    exclude: str | list[str] | None = Field(None, description="sites to leave alone")
    batchnorm: Literal["frozen", "adapt", "train"] = Field(
        "frozen", description="BatchNorm statistics: kept, re-estimated into the adapter, or as in training"
    )
    lean: LeanLevel = Field(
        "exact",
        description="what is kept for the backward: exact (only what the gradients need, the same bits), recompute"
        " (MLPs computed twice, the same bits), checkpoint (blocks computed twice, the same bits), compact (8-bit"
        " derivatives, bounded error), off",
    )
    fold: bool = Field(
        True, description="compute BatchNorms inside the convolution ahead of them (outputs move by rounding, 1e-6)"
    )
    frozen_dtype: Literal["fp32", "bf16", "fp16"] = Field(
        "fp32", description="type of the frozen weights and of the activations; what trains is fp32 always"
    )

    epochs: int = Field(15, ge=1, description="passes over the training images, with a validation after each")
    min_epoch_steps: int = Field(
        1, ge=1, description="optimiser steps an epoch at least: few images are passed several times"
    )
    max_steps: int | None = Field(
        None, ge=1, description="optimiser steps at most; the learning rate reaches its end there"
    )
    batch_size: int = Field(16, ge=1, description="images a step and device (batches are evened out)")
    accumulate: int = Field(1, ge=1, description="batches whose gradients are summed before a step")
    optimizer: Literal["adamw", "sgd"] = Field("adamw", description="AdamW, or SGD with Nesterov momentum 0.9")
    lr: float = Field(5e-3, gt=0, description="peak learning rate of the adapter, per step")
    head_lr: float | None = Field(None, gt=0, description="peak learning rate of the head; none: lr")
    weight_decay: float = Field(1e-4, ge=0, description="decoupled (AdamW) or L2 (SGD) decay; never on 1-D parameters")
    schedule: Literal["cosine", "constant"] = Field("cosine", description="learning rate after the warm-up")
    min_lr: float = Field(0.0, ge=0, description="learning rate at the end of the cosine")
    warmup: float = Field(0.1, ge=0, lt=1, description="fraction of all steps with a linearly rising rate")
    grad_clip: float | None = Field(5.0, gt=0, description="largest global gradient norm; none: no limit")
    label_smoothing: float = Field(0.0, ge=0, lt=1, description="probability mass spread over all classes")
    early_stopping: int | None = Field(
        None, ge=1, description="epochs without a better `monitor` before training stops; none: never"
    )
    monitor: Literal["val_accuracy", "val_loss"] = Field(
        "val_accuracy", description="what picks best.ckpt and drives early stopping"
    )
    keep: Literal["best", "last"] | None = Field(
        None, description="epoch whose weights are the result; none: best with early stopping, else last"
    )
    checkpoint_every: int | None = Field(
        None, ge=1, description="also save last.ckpt every so many steps, not only at epoch ends"
    )

    image_size: int | None = Field(None, ge=8, description="side of the square input, px; none: backbone's")
    augment: Literal["none", "light", "standard"] = Field(
        "light",
        description="training images: mirrored and shifted a little, timm's random resized crops, or none",
    )
    mirror: bool | None = Field(None, description="does a mirrored image keep its class? none: ask the data")
    cache_prefix: bool = Field(
        False, description="compute what lies below the first trained site once per image and keep it; augment=none"
    )
    cache_dtype: Literal["float16", "float32"] = Field("float16", description="type in which cache_prefix keeps it")
    cache_dir: Path | None = Field(
        None, description="folder of what cache_prefix keeps, shared by runs; none: the run's own"
    )
    shots: int | None = Field(None, ge=1, description="training images a class (few-shot); none: all")
    val_fraction: float = Field(0.2, gt=0, lt=1, description="share of train used as val where data has none")
    strict: bool = Field(False, description="stop at an unreadable image instead of leaving it out")

    seed: int = Field(0, ge=0, lt=2**31, description="start of every random choice")
    device: Literal["auto", "cpu", "cuda", "mps"] = Field("auto", description="where to compute")
    devices: int = Field(1, ge=1, description="how many of them (data parallel)")
    strategy: Literal["auto", "ddp", "ddp_spawn"] = Field("auto", description="how several devices cooperate")
    precision: Literal["32", "bf16-mixed", "16-mixed"] | None = Field(
        None, description="arithmetic of training; none: 32, or that of frozen_dtype"
    )
    channels_last: bool | None = Field(
        None, description="channels-last memory, faster for convolutions; none: by the architecture"
    )
    deterministic: bool = Field(True, description="the same bits each time on the same CUDA device")
    workers: int | None = Field(
        None, ge=0, description="processes that load images; none: 0 on cpu and mps, up to 8 with cuda"
    )

    def __init__(self, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise GraftError(_one_line(error, type(self))) from None

    @model_validator(mode="before")
    @classmethod
    def _spelled_none(cls, values: Any) -> Any:
        """``none`` means no value wherever a field may have none (YAML itself only knows ``null``)."""
        if not isinstance(values, Mapping):
            return values
        fields = cls.model_fields
        return {
            key: None
            if isinstance(value, str)
            and value.strip().lower() in {"none", "null"}
            and key in fields
            and _may_be_none(fields[key].annotation)
            else value
            for key, value in values.items()
        }

    @field_validator("lean", mode="before")
    @classmethod
    def _lean_switch(cls, value: Any) -> Any:
        """YAML reads ``off`` as false, and a switch is what `lean` once was."""
        switches = {True: "exact", "true": "exact", False: "off", "false": "off"}
        return switches.get(value, value) if isinstance(value, (bool, str)) else value

    @field_validator("precision", mode="before")
    @classmethod
    def _precision_number(cls, value: Any) -> Any:
        return str(value) if isinstance(value, int) and not isinstance(value, bool) else value

    @property
    def method_name(self) -> str:
        """The method without its options: ``conv-adapter`` for ``conv-adapter[reduction=4]``."""
        return bare_method(self.method)

    def to_yaml(self) -> str:
        """The settings as YAML, each with its description as a comment; `TrainConfig` reads it back."""
        lines = []
        for name, value in self.model_dump(mode="json").items():
            description = type(self).model_fields[name].description
            text = yaml.safe_dump({name: value}, sort_keys=False, width=10_000).rstrip("\n")
            lines.append(f"# {description}\n{text}")
        return "\n".join(lines) + "\n"


def configure(data: str, *, recipe: str | Path | None = None, **options: Any) -> TrainConfig:
    """The settings of a run: recipe of the method < ``recipe`` < ``options``.

    An explicit number of epochs is taken literally: it lifts the limits on steps that a recipe sets below it
    (``min_epoch_steps``, ``max_steps``).

    Args:
        data: What `torchgraft.data.load_data` takes.
        recipe: Name of a bundled recipe or path of a YAML file.
        options: Fields of `TrainConfig`.

    Raises:
        GraftError: An unknown name, a wrong type, or a recipe that cannot be read.
    """
    chosen = load_recipe(recipe) if recipe is not None else {}
    check_names(chosen, where=f"recipe {recipe}")
    check_names(options)
    method = options.get("method", chosen.get("method", TrainConfig.model_fields["method"].default))
    base = default_recipe(bare_method(str(method)))
    check_names(base, where=f"recipe of {method}")
    merged: dict[str, Any] = {}
    for layer in (base, chosen, options):
        if "epochs" in layer:
            merged.pop("min_epoch_steps", None)
            merged.pop("max_steps", None)
        merged.update(layer)
    return TrainConfig(**{**merged, "method": method, "data": data})


def parse_options(pairs: Iterable[str]) -> dict[str, Any]:
    """``["lr=1e-3", "shots=16"]`` as a dictionary; values are read as YAML.

    Raises:
        GraftError: An entry without ``=``, or an unknown name.
    """
    options: dict[str, Any] = {}
    for pair in pairs:
        name, equals, text = pair.partition("=")
        if not equals or not name.strip():
            raise GraftError(f"option {pair!r} is not of the form key=value, for example lr=0.001")
        try:
            options[name.strip().replace("-", "_")] = yaml.safe_load(text) if text.strip() else None
        except yaml.YAMLError:
            options[name.strip().replace("-", "_")] = text
    check_names(options)
    return options


def read_config(path: Path) -> TrainConfig:
    """The settings that a run folder's ``config.yaml`` holds.

    Raises:
        GraftError: The file is missing, is not YAML, or holds something else.
    """
    return TrainConfig(**load_recipe(path))


def check_names(values: Mapping[str, Any], where: str = "option") -> None:
    """Raise a `GraftError` with the nearest name for the first key that is no setting."""
    for name in values:
        if name not in TrainConfig.model_fields:
            raise GraftError(f"{where}: there is no setting {name!r}; {nearest(name, TrainConfig.model_fields)}")


def bare_method(method: str) -> str:
    """The name in front of a method's options; of several methods added together, the first one's."""
    return re.split(r"[\[+]", method, maxsplit=1)[0].strip()


# pydantic's error kinds start with the type it wanted.
_WANTED = {
    "int": "a whole number",
    "float": "a number",
    "finite": "a finite number",
    "bool": "true or false",
    "string": "text",
    "path": "a path",
    "list": "a list of texts",
}


def _one_line(error: ValidationError, model: type[BaseModel]) -> str:
    """The first complaint of pydantic in one line: field, what was given, what was expected."""
    complaints = error.errors()
    first = complaints[0]
    name = str(first["loc"][0]) if first["loc"] else "settings"
    if first["type"] == "extra_forbidden":
        return f"there is no setting {name!r}; {nearest(name, model.model_fields)}"
    about = model.model_fields[name].description
    if first["type"] == "missing":
        return f"{name} is missing: {about}"
    # A field of several types fails once for each of them.
    kinds = [e["type"].split("_")[0] for e in complaints if e["loc"][:1] == (name,)]
    if all(kind in _WANTED for kind in kinds):
        expected = " or ".join(dict.fromkeys(_WANTED[kind] for kind in kinds))
    else:
        expected = first["msg"].removeprefix("Input should be ")
    return f"{name}: {first['input']!r} was given, expected {expected} ({about})"


def _may_be_none(annotation: Any) -> bool:
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return any(_may_be_none(arg) for arg in typing.get_args(annotation))
    return annotation is type(None)
