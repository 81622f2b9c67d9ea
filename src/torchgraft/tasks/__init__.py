"""Tasks: what an adapter is trained for. Classification: configure, train, evaluate, predict."""

from __future__ import annotations

from ..recipes import default_recipe, list_recipes, load_recipe
from .classification import ClassificationTask
from .config import TrainConfig, configure, parse_options, read_config
from .inference import Classifier, evaluate, load_classifier, predict
from .results import EvalResult, Mistake, Prediction, RunResult, read_result
from .training import train

__all__ = [
    "ClassificationTask",
    "Classifier",
    "EvalResult",
    "Mistake",
    "Prediction",
    "RunResult",
    "TrainConfig",
    "configure",
    "default_recipe",
    "evaluate",
    "list_recipes",
    "load_classifier",
    "load_recipe",
    "parse_options",
    "predict",
    "read_config",
    "read_result",
    "train",
]
