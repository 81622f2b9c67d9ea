"""Builder of the system ``lv_adapter``: the adapter of a level, and language to vision behind it."""

from __future__ import annotations

from torch import Tensor, nn

from torchgraft.errors import GraftError
from torchgraft.tasks.dense.lv_adapter import LanguageToVision, LevelAdapter

from ..backbone_case import BackboneCase
from ..case import Config, GoldenCase, Tensors
from ..files import CaseError

_KEYS = frozenset({"form", "channels", "bottleneck", "text_dim", "attn_dim", "heads", "num_classes", "tau"})


def block(config: Config, mode: str) -> GoldenCase:
    """A map and texts in; the adapted map, the map with its context, scores and attention out."""
    if unknown := sorted(config.keys() - _KEYS):
        raise CaseError(f"lv_adapter: the config holds {', '.join(unknown)}, which means nothing to us")
    try:
        adapter = LevelAdapter(config["channels"], config["bottleneck"])
        l2v = LanguageToVision(
            config["channels"], config["text_dim"], config["attn_dim"], config["heads"], config["tau"]
        )
    except GraftError as error:
        raise CaseError(str(error)) from error
    return BlockCase(adapter, l2v, config["num_classes"])


FORMS = {"block": block}


class BlockCase(BackboneCase):
    """The loss is the mean square of ``out``, and that of ``score``."""

    def __init__(self, adapter: LevelAdapter, l2v: LanguageToVision, num_classes: int) -> None:
        super().__init__(nn.ModuleDict({"adapter": adapter, "l2v": l2v}), lambda key: key)
        self._num_classes = num_classes

    def forward(self, inputs: Tensors) -> Tensors:
        if inputs["text"].shape[1] != self._num_classes:
            raise CaseError(f"lv_adapter: {inputs['text'].shape[1]} texts, the config says {self._num_classes} classes")
        parts: nn.ModuleDict = self.model  # type: ignore[assignment]
        adapted = parts["adapter"](inputs["x"])
        found = parts["l2v"](adapted, inputs["text"])
        return {"adapted": adapted, "out": found.output, "score": found.score, "attn": found.attention}

    def loss(self, outputs: Tensors) -> Tensor:
        return outputs["out"].square().mean() + outputs["score"].square().mean()
