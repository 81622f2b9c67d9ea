"""Builder of the system ``spm``: one prompt matcher."""

from __future__ import annotations

from torch import Tensor

from torchgraft.errors import GraftError
from torchgraft.tasks.dense.spm import PromptMatcher, interim_loss

from ..backbone_case import BackboneCase
from ..case import Config, GoldenCase, Tensors
from ..files import CaseError

_OPTIONS = ("channels", "num_classes", "rank", "kernel", "steps", "tie_templates", "groups")
"""Keys of a config besides ``form`` and ``prefix_tokens``: our options have the same names."""


def matcher(config: Config, mode: str) -> GoldenCase:
    """A map in; the matched map, every interim map and their loss out."""
    if unknown := sorted(config.keys() - {"form", "prefix_tokens", *_OPTIONS}):
        raise CaseError(f"spm: the config holds {', '.join(unknown)}, which means nothing to us")
    try:
        module = PromptMatcher(**{name: config[name] for name in _OPTIONS})
    except GraftError as error:
        raise CaseError(str(error)) from error
    return MatcherCase(module, config["prefix_tokens"])


FORMS = {"matcher": matcher}


class MatcherCase(BackboneCase):
    """The loss is the mean square of ``out``, and ``aux``."""

    def __init__(self, module: PromptMatcher, prefix_tokens: int) -> None:
        super().__init__(module, lambda key: key)
        self._prefix_tokens = prefix_tokens

    def forward(self, inputs: Tensors) -> Tensors:
        matcher: PromptMatcher = self.model  # type: ignore[assignment]
        found = matcher(inputs["x"])
        outputs = {"out": found.output, **{f"sem{step}": each for step, each in enumerate(found.interim)}}
        if self._prefix_tokens:
            height, width = inputs["x"].shape[-2:]
            tokens = matcher.match_tokens(inputs["tokens"], (height, width), self._prefix_tokens)
            outputs["tokens_out"] = tokens.output
        return {**outputs, "aux": interim_loss([found.interim], inputs["gt"])}

    def loss(self, outputs: Tensors) -> Tensor:
        return outputs["out"].square().mean() + outputs["aux"]
