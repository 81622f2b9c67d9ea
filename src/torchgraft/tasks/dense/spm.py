"""SPM: matching the output of a frozen stage to what a segmentation task needs of it.

A design after the idea of "Prompt-Matched Semantic Segmentation", arXiv:2208.10159 (version 3), whose code was never
released. Its abstract states what is kept here: a frozen backbone cut into stages, a small matcher between every two,
which predicts an interim semantic map and adds a prompt made from it, step by step. The internals below are our own.

For a map F (B, C, h, w), K classes, rank r and T steps that share their weights:

    X_0 = F
    Z   = GELU(GroupNorm(down(X_t)))            down: 1x1, C -> r, no bias
    Z   = Z + dw(Z)                             depthwise k x k
    S_t = <Z(p), E_k> / sqrt(r) + b_k           (B, K, h, w): the interim semantic logits
    R   = sum_k softmax_k(S_t)(p) E_k           (B, r, h, w)
    X_{t+1} = X_t + up(Z + R)                   up: 1x1, r -> C, starts at zero

So the matched network starts as the frozen one. The templates E (K, r) are both what Z is correlated with and what the
prompt is made of, which is a matched filter; ``tie_templates=False`` has a second bank for the prompt. Until ``up`` has
left zero, the other weights get their gradient from the interim maps alone.

Parameters of a matcher: 2 C r + C + r k^2 + 3 r + K r + K, and K r more when untied.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...errors import GraftError
from .pixel_loss import IGNORE_INDEX, pixel_cross_entropy

__all__ = [
    "INTERIM_WEIGHT",
    "Matched",
    "MatchedFeatures",
    "PromptMatcher",
    "StageHook",
    "StagePromptMatching",
    "default_rank",
    "interim_loss",
]

INTERIM_WEIGHT = 0.4
"""Weight of the interim loss beside the decoder's; ours."""


class Matched(NamedTuple):
    """What a matcher returns.

    Attributes:
        output: X_T, of the shape of the input.
        interim: The logits (B, K, h, w) of every step.
    """

    output: Tensor
    interim: list[Tensor]


class MatchedFeatures(NamedTuple):
    """What matched stages return.

    Attributes:
        maps: For the decoder: the matched output of every stage but the last, and the last stage's own.
        interim: The logits (B, K, h, w) of every step, for every boundary.
    """

    maps: list[Tensor]
    interim: list[list[Tensor]]


def default_rank(channels: int) -> int:
    """A sixteenth of the channels, from 16 to 64."""
    return min(64, max(16, channels // 16))


class PromptMatcher(nn.Module):
    """The matcher behind one stage, for maps of any size.

    Args:
        channels: C of the map.
        num_classes: K.
        rank: Width r inside; default: :func:`default_rank`.
        kernel: Side k of the depthwise convolution, odd.
        steps: Recurrent steps T.
        tie_templates: Whether the prompt is made of the templates that the map is correlated with.
        groups: Groups of the norm.
        device: Where the parameters are made.
        dtype: Their type.

    Raises:
        GraftError: A number is below 1, the kernel is even, or the groups do not divide the rank.
    """

    def __init__(
        self,
        channels: int,
        num_classes: int,
        rank: int | None = None,
        kernel: int = 5,
        steps: int = 2,
        tie_templates: bool = True,
        groups: int = 1,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        rank = default_rank(channels) if rank is None else rank
        if min(channels, num_classes, rank, steps, groups) < 1:
            raise GraftError(
                f"SPM: channels={channels}, num_classes={num_classes}, rank={rank}, steps={steps}, groups={groups}: "
                "each must be at least 1"
            )
        if kernel < 1 or kernel % 2 == 0:
            raise GraftError(f"SPM: kernel={kernel}: expected an odd number, so that the map keeps its size")
        if rank % groups:
            raise GraftError(f"SPM: groups={groups} do not divide rank={rank}")
        dd = {"device": device, "dtype": dtype}
        self.channels, self.num_classes, self.rank, self.steps = channels, num_classes, rank, steps
        self.down = nn.Conv2d(channels, rank, 1, bias=False, **dd)
        self.norm = nn.GroupNorm(groups, rank, **dd)
        self.dw = nn.Conv2d(rank, rank, kernel, padding=kernel // 2, groups=rank, **dd)
        self.templates = nn.Parameter(torch.empty(num_classes, rank, **dd))
        self.bias = nn.Parameter(torch.empty(num_classes, **dd))
        self.prompt_bank = None if tie_templates else nn.Parameter(torch.empty(num_classes, rank, **dd))
        self.up = nn.Conv2d(rank, channels, 1, **dd)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Random weights, with which the matcher returns its input."""
        for conv in (self.down, self.dw):
            nn.init.trunc_normal_(conv.weight, std=0.02)
        for zero in (self.dw.bias, self.bias, self.up.weight, self.up.bias):
            assert zero is not None
            nn.init.zeros_(zero)
        for bank in (self.templates, self.prompt_bank):
            if bank is not None:
                nn.init.normal_(bank, std=self.rank**-0.5)

    def forward(self, x: Tensor) -> Matched:
        """A map (B, C, h, w) to the matched map and the interim logits of every step.

        Raises:
            GraftError: The map has another number of channels.
        """
        if x.dim() != 4 or x.shape[1] != self.channels:
            raise GraftError(f"SPM: a tensor {tuple(x.shape)}: expected a map (B, {self.channels}, h, w)")
        interim = []
        for _ in range(self.steps):
            z = F.gelu(self.norm(self.down(x)))
            z = z + self.dw(z)
            semantic = F.conv2d(z, _filters(self.templates) / math.sqrt(self.rank), self.bias)
            bank = self.templates if self.prompt_bank is None else self.prompt_bank
            prompt = F.conv2d(semantic.softmax(1), _filters(bank.t()))
            x = x + self.up(z + prompt)
            interim.append(semantic)
        return Matched(x, interim)

    def match_tokens(self, tokens: Tensor, grid: tuple[int, int], prefix_tokens: int = 0) -> Matched:
        """Tokens (B, P + h w, C) to matched tokens; the first P (class and register tokens) pass unchanged.

        Args:
            tokens: The tokens, those of the patches row by row.
            grid: (h, w) of the patches.
            prefix_tokens: P.

        Raises:
            GraftError: The number of tokens is another.
        """
        if tokens.dim() != 3 or tokens.shape[1] != prefix_tokens + grid[0] * grid[1]:
            raise GraftError(
                f"SPM: tokens {tuple(tokens.shape)}: expected (B, {prefix_tokens} + {grid[0]} * {grid[1]}, "
                f"{self.channels})"
            )
        prefix, patches = tokens[:, :prefix_tokens], tokens[:, prefix_tokens:]
        found = self(patches.transpose(1, 2).unflatten(2, grid))
        return Matched(torch.cat([prefix, found.output.flatten(2).transpose(1, 2)], dim=1), found.interim)


class StagePromptMatching(nn.Module):
    """One matcher per boundary between the stages of a frozen backbone.

    Gradients must flow through every stage but the first, so none of those may run under ``torch.no_grad``.

    Args:
        channels: Channels of the outputs of all stages but the last.
        num_classes: K.
        rank: Width inside; default: :func:`default_rank` of each.
        **kwargs: For every :class:`PromptMatcher`.

    Raises:
        GraftError: There is no boundary, or a matcher cannot be built.
    """

    def __init__(self, channels: Sequence[int], num_classes: int, rank: int | None = None, **kwargs: Any) -> None:
        super().__init__()
        if not channels:
            raise GraftError("SPM: channels=[]: expected those of every stage but the last")
        self.matchers = nn.ModuleList(PromptMatcher(width, num_classes, rank, **kwargs) for width in channels)

    def forward(self, stages: Sequence[Callable[[Tensor], Tensor]], x: Tensor) -> MatchedFeatures:
        """Run the stages with the matchers between them.

        Args:
            stages: One more than there are matchers; each takes the map of the one before.
            x: What the first stage takes.

        Raises:
            GraftError: The number of stages is another.
        """
        if len(stages) != len(self.matchers) + 1:
            raise GraftError(f"SPM: {len(stages)} stages for {len(self.matchers)} matchers: expected one stage more")
        hook, maps = self.hook(), []
        for index, stage in enumerate(stages):
            x = hook(index, stage(x))
            maps.append(x)
        return MatchedFeatures(maps, hook.interim)

    def hook(self, grid: tuple[int, int] | None = None, prefix_tokens: int = 0) -> StageHook:
        """What to call behind the stages in one forward of a backbone that runs them itself.

        Args:
            grid: (h, w) of the patches where the stages return tokens; None where they return maps.
            prefix_tokens: Tokens in front of the patches.
        """
        return StageHook(self, grid, prefix_tokens)


class StageHook:
    """Matches the outputs of the stages during one forward, and keeps their interim maps.

    Attributes:
        interim: The logits of every step, for every boundary so far.
    """

    def __init__(self, matching: StagePromptMatching, grid: tuple[int, int] | None, prefix_tokens: int) -> None:
        self._matching, self._grid, self._prefix_tokens = matching, grid, prefix_tokens
        self.interim: list[list[Tensor]] = []

    def __call__(self, index: int, x: Tensor) -> Tensor:
        """The matched output of stage ``index``; that of the last stage is returned as it is."""
        matchers = self._matching.matchers
        if index >= len(matchers):
            return x
        matcher: Any = matchers[index]
        found = matcher(x) if self._grid is None else matcher.match_tokens(x, self._grid, self._prefix_tokens)
        self.interim.append(found.interim)
        return found.output


def interim_loss(interim: Sequence[Sequence[Tensor]], labels: Tensor, *, ignore_index: int = IGNORE_INDEX) -> Tensor:
    """The mean over boundaries and steps of the cross-entropy of the interim maps; weigh it by ``INTERIM_WEIGHT``.

    Args:
        interim: Logits (B, K, h, w) of every step, for every boundary.
        labels: Integers (B, H, W); ``ignore_index`` does not count.
        ignore_index: Label of the pixels that do not count.

    Raises:
        GraftError: There is no interim map, or the shapes do not belong together.
    """
    maps = [semantic for steps in interim for semantic in steps]
    if not maps:
        raise GraftError("SPM: no interim map: expected those of at least one boundary")
    return torch.stack([pixel_cross_entropy(each, labels, ignore_index=ignore_index) for each in maps]).mean()


def _filters(bank: Tensor) -> Tensor:
    """A bank (out, in) as the weight of a 1x1 convolution."""
    return bank[:, :, None, None]
