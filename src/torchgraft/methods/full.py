"""Full fine-tuning, of a copy.

    theta' = theta + d        every parameter theta of the backbone

The adapter owns a trainable copy of every parameter, so that the backbone stays what it was, bit for bit, and
other adapters on it do too. Without ``num_classes`` the classifier's copy trains as well; with it the adapter's
own head takes its place. BatchNorm statistics follow ``batchnorm=`` of :func:`torchgraft.attach`.

Parameters: all of the backbone (ResNet-50 23,508,032, ViT-B/16 85,798,656 without classifier). Mergeable: it
is the weight. Start: the pretrained network.
"""

from __future__ import annotations

import dataclasses

from ..core.anatomy import Anatomy
from ..core.method import Method, register
from ..core.placements import Placement
from .forms import copies


@register("full")
@dataclasses.dataclass(frozen=True)
class Full(Method):
    """Config of full fine-tuning; it has no options (``include`` and ``exclude`` narrow it)."""

    def placements(self, anatomy: Anatomy) -> list[Placement]:
        """A copy of every parameter in the selection."""
        return [*copies(anatomy, lambda path, module, name: True)]
