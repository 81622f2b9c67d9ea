"""Linear probing: the classifier alone.

    y = W f(x) + b        f frozen

With ``num_classes`` the adapter's own head is all there is; without it a copy of the backbone's classifier
trains. ``norm=True`` is what the published Conv-Adapter code (commit 97e1fc8) calls linear: there every
parameter whose name starts with ``norm`` trains too. That is the final LayerNorm or GroupNorm of ConvNeXt, Swin
and BiT, and on a ResNet a *new* BatchNorm on the last map before pooling; EfficientNet and the CLIP ResNets have
neither.

Parameters: d * classes + classes, and 2 d more with ``norm``. 100 classes: ResNet-50 204,900 (208,996),
ConvNeXt-T 76,900 (78,436). Mergeable: it is the weight (the new BatchNorm is not: no linear layer stands next to
it). Start: the pretrained features; the new BatchNorm, with its statistics at 0 and 1, leaves them unchanged.
"""

from __future__ import annotations

import dataclasses

from ..core.anatomy import Anatomy
from ..core.head import head_paths
from ..core.layers import is_batchnorm, is_norm
from ..core.method import Method, register
from ..core.placements import Placement
from .forms import copies
from .forms.before_pooling import block_family, norm_before_pooling


@register("linear")
@dataclasses.dataclass(frozen=True)
class Linear(Method):
    """Config of linear probing.

    Attributes:
        norm: Also train the final norm, as the published code does; a new BatchNorm on ResNets.
    """

    norm: bool = False

    def placements(self, anatomy: Anatomy) -> list[Placement]:
        """A copy of the classifier; nothing where the model has none and its own head is asked for."""
        trained = tuple(f"{p}." for p in [*head_paths(anatomy), _final_norm(anatomy) if self.norm else None] if p)
        placed: list[Placement] = [*copies(anatomy, lambda path, module, name: f"{path}.".startswith(trained))]
        if self.norm and block_family(anatomy) == "resnet":
            placed.append(norm_before_pooling(anatomy))
        return placed


def _final_norm(anatomy: Anatomy) -> str | None:
    """The last LayerNorm or GroupNorm, when no block or stage holds it."""
    inside = tuple(f"{s.root}." for s in anatomy.stages)
    for path, module in reversed(anatomy.modules.items()):
        if is_norm(module) and not is_batchnorm(module):
            return None if f"{path}.".startswith(inside) else path
    return None
