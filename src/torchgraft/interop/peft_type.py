"""What every adapter type of HF peft has: options, tensors per layer, and what our method makes of them."""

from __future__ import annotations

import collections
import math
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor

from ..core.anatomy import Anatomy
from ..core.method import Method
from ..errors import GraftError

_SILENT = frozenset({
    "auto_mapping", "base_model_name_or_path", "ensure_weight_tying", "eva_config", "exclude_modules", "fan_in_fan_out",
    "inference_mode", "init_ia3_weights", "init_weights", "layers_pattern", "layers_to_transform", "loftq_config",
    "megatron_core", "modules_to_save", "peft_type", "peft_version", "qalora_group_size", "revision", "runtime_config",
    "target_modules", "task_type",
})  # fmt: skip
"""Options that change nothing about what a saved adapter computes."""


class PeftType:
    """One ``peft_type``.

    Attributes:
        name: The type as peft writes it.
        ours: Our method.
        joins_rows: Whether changes of some rows can be written as one of the whole layer.
        tensors: Its tensor names; see :func:`tensor_names`.
        options: Options that :meth:`method` reads.
        dims: Dimensions of the convolutions that peft adapts; 0 stands for linear layers.
    """

    name: ClassVar[str]
    ours: ClassVar[type[Method]]
    joins_rows: ClassVar[bool] = False
    tensors: ClassVar[re.Pattern[str]]
    options: ClassVar[frozenset[str]]
    dims: ClassVar[tuple[int, ...]] = (0, 1, 2)
    config: Mapping[str, Any]

    def __init__(self, config: Mapping[str, Any] | None = None, where: Path | str = "") -> None:
        self.config, self.where = config or {}, where

    def check(self) -> None:
        """Refuse options that would make the adapter compute something else than we would.

        Raises:
            GraftError: Names the option.
        """
        for option, value in self.config.items():
            if option not in self.options and option not in _SILENT and value not in (None, False, "", [], {}):
                raise GraftError(
                    f"{self.where}: the option {option}={value!r} of {self.name} is not supported; "
                    "merge the adapter with peft and use the merged model"
                )
        dropped = [o for o in ("rank_dropout", "module_dropout") if self.config.get(o)]
        if dropped:
            warnings.warn(f"{self.where}: {' and '.join(dropped)} act in training only and are left out", stacklevel=4)

    def method(self, layers: Mapping[str, Layer], anatomy: Anatomy) -> Method:
        """The method that makes room for these layers, by our paths."""
        raise TypeError(f"{type(self).__name__} reads nothing")

    def load(self, placement: Any, layer: Layer) -> None:
        """Copy the tensors of one layer into its placement."""
        raise TypeError(f"{type(self).__name__} reads nothing")

    def dump(self, placements: list[Any], path: str, anatomy: Anatomy) -> dict[str, Tensor]:
        """The tensors of one layer, by the names that peft gives them."""
        raise TypeError(f"{type(self).__name__} writes nothing")

    def written(self, method: Any, homes: Mapping[str, list[Any]]) -> dict[str, Any]:
        """The options of peft for what is attached."""
        raise TypeError(f"{type(self).__name__} writes nothing")

    def rank_of(self, placements: list[Any]) -> int:
        """The rank of the change of one layer; 0 where it has none."""
        return 0

    def number(self, option: str, default: float, *, whole: bool = False) -> Any:
        """The value of a numeric option."""
        value = self.config.get(option, default)
        fits = isinstance(value, int if whole else (int, float)) and not isinstance(value, bool) and value >= 0
        if not fits or value != value or math.isinf(value):
            kind = "a whole number" if whole else "a number"
            raise GraftError(f"{self.where}: {option}={value!r} is not valid; expected {kind} of at least 0")
        return value

    def per_layer(self, option: str, layer: Layer, default: Any) -> Any:
        """The value that a pattern (``rank_pattern``, ``alpha_pattern``) gives a layer, by peft's rule."""
        pattern = self.config.get(option) or {}
        if not isinstance(pattern, dict):
            raise GraftError(f"{self.where}: {option}={pattern!r} is not valid; expected an object")
        try:
            fits = [v for key, v in pattern.items() if re.match(rf"(.*\.)?({key})$", layer.name)]
        except re.error as error:
            raise GraftError(f"{self.where}: {option} holds a pattern that cannot be read ({error})") from error
        return fits[0] if fits else default


def tensor_names(endings: str) -> re.Pattern[str]:
    """What a whole tensor name looks like: the module's path, a dot, one of the endings."""
    return re.compile(rf"(?P<module>.+)\.(?P<tensor>{endings})")


class Layer:
    """The tensors of one module in a file.

    Attributes:
        name: Path of the module in the file.
        tensors: Its tensors, by what stands behind the path.
    """

    def __init__(self, name: str) -> None:
        self.name, self.tensors = name, dict[str, Tensor]()

    def take(self, name: str, like: Tensor, where: Path | str) -> Tensor:
        """One tensor in the shape of ours.

        Raises:
            GraftError: It is missing or does not fit.
        """
        held = self.tensors.get(name)
        if held is None:
            raise GraftError(f"{where}: {self.name}.{name} is missing; restore the file from a copy")
        if held.numel() != like.numel() or held.shape[0] != like.shape[0]:
            raise GraftError(
                f"{where}: {self.name}.{name} has shape {tuple(held.shape)}, this model needs {tuple(like.shape)}; "
                "it belongs to another backbone"
            )
        return held.view_as(like)


class DeltaType(PeftType):
    """LoRA, LoKr and LoHa: deltas with a rank and a scale per layer."""

    alpha: ClassVar[str] = "alpha"

    def settings(self, layers: Mapping[str, Layer], anatomy: Anatomy) -> dict[str, Any]:
        """Rank and alpha, as options of our method."""
        ranks = {path: self.rank(layer) for path, layer in layers.items()}
        default = self.number(self.alpha, 8)
        alphas = {path: float(self.per_layer("alpha_pattern", layer, default)) for path, layer in layers.items()}
        rank, rank_pattern = _common(ranks, anatomy)
        alpha, alpha_pattern = _common(alphas, anatomy)
        common = {"rank": rank, "rank_pattern": rank_pattern, "alpha": alpha, "alpha_pattern": alpha_pattern}
        return {**common, "targets": "all"}

    def written(self, method: Any, homes: Mapping[str, list[Any]]) -> dict[str, Any]:
        """Rank and alpha of every layer; a change whose rank was cut keeps its scale."""
        ranks = {path: self.rank_of(placements) for path, placements in homes.items()}
        power = 0.5 if getattr(method, "rslora", False) else 1.0
        alphas = {path: round(p[0].form.scale * ranks[path] ** power, 10) for path, p in homes.items()}
        rank, alpha = (collections.Counter(v.values()).most_common(1)[0][0] for v in (ranks, alphas))
        return {
            "r": rank,
            self.alpha: alpha,
            "rank_pattern": {f"^{re.escape(p)}": r for p, r in ranks.items() if r != rank},
            "alpha_pattern": {f"^{re.escape(p)}": a for p, a in alphas.items() if a != alpha},
            **{
                o: getattr(method, o)
                for o in self.options
                if hasattr(method, o) and "pattern" not in o and o != "alpha"
            },
        }

    def rank(self, layer: Layer) -> int:
        """The rank of one layer, as far as the configuration tells."""
        rank = self.per_layer("rank_pattern", layer, self.number("r", 8, whole=True))
        if not isinstance(rank, int) or rank < 1:
            raise GraftError(f"{self.where}: the rank {rank!r} is not valid; expected a whole number of at least 1")
        return rank


def _common(values: Mapping[str, Any], anatomy: Anatomy) -> tuple[Any, tuple[tuple[str, Any], ...]]:
    """The value that most layers have, and (address, value) of the others; inner modules first."""
    usual = collections.Counter(values.values()).most_common(1)[0][0]
    others = [(anatomy.address(p), v) for p, v in values.items() if v != usual]
    return usual, tuple(sorted(others, key=lambda pair: -len(pair[0])))
