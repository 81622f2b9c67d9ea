"""What backbones of a stem, a row of stages and a head have in common: timm's methods around them.

Annotations are not postponed here: TorchScript reads those of a traced model from the objects themselves.
"""

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from timm.layers import NormMlpClassifierHead, get_device_dtype
from timm.models import checkpoint_seq
from torch import Tensor, nn

from .timm_api import feature_take_indices


class PyramidStage(nn.Module):
    """Blocks of one resolution, behind the step down to it: (B, C', H', W') -> (B, C, H, W).

    Args:
        downsample: (B, C', H', W') -> (B, C, H, W).
        blocks: The blocks.
    """

    def __init__(self, downsample: nn.Module, blocks: Iterable[nn.Module]) -> None:
        super().__init__()
        self.grad_checkpointing = False
        self.downsample = downsample
        self.blocks = nn.Sequential(*blocks)

    def forward(self, x: Tensor) -> Tensor:
        """The stage's map."""
        x = self.downsample(x)
        if self.grad_checkpointing and not torch.jit.is_scripting():
            return checkpoint_seq(self.blocks, x)
        return self.blocks(x)


class Pyramid(nn.Module):
    """A backbone whose stages give maps of falling resolution, (B, C, H, W) each.

    A subclass sets the attributes; every stage has a flag ``grad_checkpointing``, a ``downsample`` and ``blocks``.

    Attributes:
        stem: From the image to the first stage.
        stages: The stages in a row.
        head: Pooling and classifier, with or without a norm.
        feature_info: Channels, stride and name of the maps.
        num_features: Channels of the last map.
        head_hidden_size: What the classifier reads.
        num_classes: Classes; 0: no classifier.
    """

    if TYPE_CHECKING:  # TorchScript would make attributes of its own of them
        stem: nn.Module
        stages: nn.Sequential
        head: Any
        feature_info: list[dict[str, Any]]
        num_features: int
        head_hidden_size: int
        num_classes: int

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Regular expressions that order the parameters by depth, or by stage where ``coarse``."""
        fine = [(r"^stages\.(\d+)\.downsample", (0,)), (r"^stages\.(\d+)\.blocks\.(\d+)", None)]
        return {"stem": r"^stem", "blocks": r"^stages\.(\d+)" if coarse else fine}

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute the blocks in the backward instead of keeping what they computed."""
        for stage in self.stages:
            stage.grad_checkpointing = enable  # type: ignore[assignment]

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        """The linear layer (``nn.Identity`` without classes)."""
        return self.head.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None, reset_other: bool = False) -> None:
        """Put a new classifier in place.

        Args:
            num_classes: Its outputs; 0: none.
            global_pool: Pooling in front of it; None: as it is.
            reset_other: Also take the norm in front of it away, where there is one.
        """
        self.num_classes = num_classes
        more = {"reset_other": reset_other} if isinstance(self.head, NormMlpClassifierHead) else {}
        self.head.reset(num_classes, global_pool, in_features=self.num_features, **more, **get_device_dtype(self))
        self.head_hidden_size = self.head.num_features

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """The maps behind the stages.

        Args:
            x: Images (B, in_chans, H, W).
            indices: The last so many maps, these, or all.
            norm: Without effect: no norm stands between the last map and the head's pooling.
            stop_early: Leave out the stages behind the last map that is asked for.
            output_fmt: ``"NCHW"``.
            intermediates_only: Return the maps alone.

        Returns:
            The maps, or the output of :meth:`forward_features` and the maps.
        """
        assert output_fmt == "NCHW", "Output shape must be NCHW."
        intermediates: list[Tensor] = []
        take_indices, max_index = feature_take_indices(len(self.stages), indices)
        if torch.jit.is_scripting() or not stop_early:
            stages = self.stages
        else:
            stages = self.stages[: max_index + 1]
        x = self.stem(x)
        before = x
        for i, stage in enumerate(stages):
            before, x = x, stage(x)
            if i in take_indices:
                intermediates.append(x)
        if intermediates_only:
            return intermediates
        return self.behind_stages(before, x) if len(stages) == len(self.stages) else x, intermediates

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Remove what the maps at ``indices`` do not need.

        Args:
            indices: As for :meth:`forward_intermediates`.
            prune_norm: Without effect: no norm stands behind the last stage.
            prune_head: Also remove the classifier, and its norm.

        Returns:
            The indices, counted from 0.
        """
        take_indices, max_index = feature_take_indices(len(self.stages), indices)
        shortened = max_index < len(self.stages) - 1
        self.stages = self.stages[: max_index + 1]
        self.num_features = self.feature_info[max_index]["num_chs"]
        if prune_head or shortened:
            self.reset_classifier(0, "", reset_other=True)
        return take_indices

    def forward_features(self, x: Tensor) -> Tensor:
        """Images (B, in_chans, H, W) to the map that the head reads, (B, num_features, H', W')."""
        x = self.stem(x)
        before = x
        for stage in self.stages:
            before, x = x, stage(x)
        return self.behind_stages(before, x)

    def behind_stages(self, before: Tensor, last: Tensor) -> Tensor:
        """What the head reads, of the last two maps; the last one, unless a subclass joins them."""
        return last

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """The last map to (B, num_classes); with ``pre_logits`` to what the classifier reads."""
        return self.head(x, pre_logits=pre_logits)

    def forward(self, x: Tensor) -> Tensor:
        """Images (B, in_chans, H, W) to logits (B, num_classes)."""
        return self.forward_head(self.forward_features(x))
