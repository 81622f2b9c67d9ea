"""WindowTokens: prompt tokens on their way through a transformer over shifted windows (Swin)."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Collection, Mapping
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...swap import original_class
from ..graft import Args, Kwargs, Tap, first_output, first_tensor, replace_first, replace_output
from ..shifted_windows import Windows
from .base import Hook, Placement, Support
from .positioned_attention import attend, reader_of, wrapped

Pool = Literal["all", "patches", "prompts"]


@dataclasses.dataclass(frozen=True)
class WindowPath:
    """The modules that prompts pass on their way through a Swin, by path.

    Attributes:
        blocks: The blocks in order, each with its module.
        attentions: The attention module of each block.
        mergings: Index of a block -> the patch merging in front of it.
        stages: Index of a block -> the module that holds the merging in front of it and views what it returns as a
            map, so that prompts cannot pass it inside the tensor; empty where there is none.
        norm: The norm behind the last block, None when there is none or nothing pools behind it.
        pool: The average pooling behind that.
    """

    blocks: Mapping[str, nn.Module]
    attentions: Mapping[str, nn.Module]
    mergings: Mapping[int, str]
    stages: Mapping[int, str]
    norm: str | None
    pool: str | None


class WindowTokens(Placement):
    """Prompts in every window: each window attends to its own copy of them, and their outputs are averaged.

    A block gets fresh prompts or those that the block before it returned. Between two blocks they travel inside
    the tensor, behind its own positions (as further rows of a map (B, H, W, C)), so that gradient checkpointing
    computes again what it computed first. A patch merging sees each prompt as a square of 2 x 2 equal pixels,
    that is repeated four times along the channels. The classifier reads the mean over prompts and patches.
    In every sum an image meets its own prompts only.

    Args:
        form: Module that returns the prompts (P, C) of a block for its index.
        path: Where they pass.
        count: Number of prompts P.
        fresh: Indices of the blocks that get prompts of their own.
        expand: The prompts go on behind the last block of ``fresh``; otherwise they are dropped there.
        dropout: Rate at which values of the prompts are dropped in training, in each image apart.
        pool: What the classifier's average is over.

    Attributes:
        splits: Whether no prompt travels inside the tensor, so that rows of several adapters can share a batch.
    """

    kind: ClassVar[str] = "window_tokens"

    def __init__(
        self,
        form: nn.Module,
        path: WindowPath,
        count: int,
        *,
        fresh: Collection[int],
        expand: bool = True,
        dropout: float = 0.0,
        pool: Pool = "all",
        slot: str | None = None,
    ) -> None:
        super().__init__(list(path.blocks)[min(fresh)], slot)
        self.form, self.path, self.count, self.pool = form, path, count, pool
        self.dropout = dropout
        self.fresh = frozenset(fresh)
        self.last = len(path.blocks) - 1 if expand else max(fresh)
        self.splits = all(i in self.fresh for i in range(min(fresh), self.last + 1))

    def hooks(self) -> list[Hook]:
        """One action at every block and attention with prompts, at every merging they pass, and at the pooling."""
        path, hooks = self.path, []
        blocks, attentions = list(path.blocks.items()), list(path.attentions.items())
        pooled = self.pool != "patches" and path.norm is not None and self.last == len(path.blocks) - 1
        arrives, end = False, Tap()
        for i in range(min(self.fresh), self.last + 1):
            passes = i < self.last and i + 1 not in self.fresh
            merging = path.mergings.get(i + 1) if passes else None
            leaves = "end" if merging or (i == self.last and pooled) else ("tensor" if passes else "no")
            window = _Attention(self, attentions[i][1], needed=leaves != "no")
            hooks.append(Hook(blocks[i][0], "around", _Block(self, blocks[i][1], window, i, arrives, leaves, end)))
            hooks.append(Hook(attentions[i][0], "around", window))
            if merging:
                stage = path.stages.get(i + 1)
                between = Tap() if stage else None
                hooks.append(Hook(merging, "around", _Merging(self, end, between)))
                if stage and between:
                    hooks.append(Hook(stage, "after", _Joining(between)))
                end = Tap()
            arrives = passes
        if pooled and path.norm is not None and path.pool is not None:
            pooling = _Pooling(self.pool)
            hooks += [Hook(path.norm, "around", _Norm(self, end, pooling)), Hook(path.pool, "after", pooling)]
        return hooks

    @classmethod
    def supports(cls, module: nn.Module) -> Support:
        """Blocks that hold a window attention whose parts are known."""
        if any(reader_of(child) is not None for child in module.children()):
            return Support(True, False, "extra tokens are no change of a weight")
        name = original_class(module).__name__
        return Support(False, False, f"{name} is no block around a window attention of a known class")


def join(x: Tensor, prompts: Tensor) -> Tensor:
    """Prompts (B, P, C) behind the positions of ``x``: tokens (B, N, C), or further rows of a map (B, H, W, C)."""
    if x.dim() == 3:
        return torch.cat([x, prompts], 1)
    return torch.cat([x, _rows(prompts, x.shape[2])], 1)


def split(x: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Undo :func:`join`."""
    if x.dim() == 3:
        own, prompts = x.split([x.shape[1] - count, count], 1)
        return own, prompts
    rows = math.ceil(count / x.shape[2])
    own, prompts = x.split([x.shape[1] - rows, rows], 1)
    return own, prompts.flatten(1, 2)[:, :count]


def _rows(prompts: Tensor, width: int) -> Tensor:
    """(B, P, C) -> (B, rows, width, C), with zeros at the end."""
    padded = F.pad(prompts, (0, 0, 0, -prompts.shape[1] % width))
    return padded.unflatten(1, (-1, width))


class _Block:
    """Around a block: the prompts' own way through it, beside that of the patches."""

    def __init__(
        self,
        tokens: WindowTokens,
        block: Any,
        window: _Attention,
        index: int,
        arrives: bool,
        leaves: str,
        end: Tap,
    ) -> None:
        self.tokens, self.block, self.window, self.index = tokens, block, window, index
        self.arrives, self.leaves, self.end = arrives, leaves, end
        hf = hasattr(block, "layernorm_before")
        self.norms = ("layernorm_before", "layernorm_after") if hf else ("norm1", "norm2")

    def around(self, forward: Callable[..., Any], args: Args, kwargs: Kwargs) -> Any:
        block, tokens, x = self.block, self.tokens, first_tensor(args, kwargs)
        if self.arrives:
            x, prompts = split(x, tokens.count)
            args, kwargs = replace_first(args, kwargs, x)
        else:
            prompts = tokens.form(self.index).to(x.dtype).repeat(x.shape[0], 1, 1)
            prompts = F.dropout(prompts, tokens.dropout, tokens.training)
        norm1, norm2 = (getattr(block, name) for name in self.norms)
        self.window.given.put(_alone(norm1, prompts, x))
        out = forward(*args, **kwargs)
        if self.leaves == "no":
            return out
        # Depth is never dropped here: the published code keeps the backbone in eval mode.
        prompts = prompts + self.window.made.take()
        prompts = prompts + _alone(block.mlp, _alone(norm2, prompts, x), x)
        if self.leaves == "tensor":
            return replace_output(out, join(first_output(out), prompts))
        self.end.put(prompts)
        return out


def _alone(module: nn.Module, prompts: Tensor, x: Tensor) -> Tensor:
    """Prompts through a module that treats every token alone, shown to it as what ``x`` is: tokens or a map."""
    return module(prompts) if x.dim() == 3 else module(prompts.unsqueeze(1)).squeeze(1)


class _Attention:
    """Around an attention: every window gets a copy of the prompts, whose outputs are averaged over the windows."""

    def __init__(self, tokens: WindowTokens, module: Any, *, needed: bool) -> None:
        self.tokens, self.module, self.needed = tokens, module, needed
        self.given, self.made = Tap(), Tap()

    def around(self, forward: Callable[..., Any], args: Args, kwargs: Kwargs) -> Any:
        x, prompts = first_tensor(args, kwargs), self.given.take()
        if x.dim() == 4:  # torchvision: a map, partitioned inside
            windows = Windows.of(x, self.module.window_size, self.module.shift_size)
            return windows.reverse(self.attend(windows.partition(x), prompts, windows.mask(x)))
        mask = kwargs.get("mask", args[1] if len(args) > 1 else kwargs.get("attention_mask"))
        return wrapped(self.module, self.attend(x, prompts, mask))

    def attend(self, windows: Tensor, prompts: Tensor, mask: Tensor | None) -> Tensor:
        """Attention over windows (B * n, N, C), in the order of the batch, with prompts (B, P, C)."""
        batch, count = prompts.shape[:2]
        number = windows.shape[0] // batch
        joined = torch.cat([prompts.repeat_interleave(number, 0), windows], 1)
        y = attend(self.module, joined, count, mask=mask)
        if self.needed:
            self.made.put(y[:, :count].unflatten(0, (batch, number)).mean(1))
        return y[:, count:]


class _Merging:
    """Around a patch merging: each prompt is a square of 2 x 2 pixels behind the map."""

    def __init__(self, tokens: WindowTokens, end: Tap, between: Tap | None) -> None:
        self.tokens, self.end, self.between = tokens, end, between

    def around(self, forward: Callable[..., Any], args: Args, kwargs: Kwargs) -> Any:
        x, prompts = first_tensor(args, kwargs), self.end.take()
        if self.between is None:
            args, kwargs = replace_first(args, kwargs, self._shown(x, prompts))
            return forward(*args, **kwargs)
        height, width = args[1]
        shown = self._shown(x.unflatten(1, (height, width)), prompts)
        size = tuple(shown.shape[1:3])
        merged, made = split(forward(shown.flatten(1, 2), size).unflatten(1, (size[0] // 2, size[1] // 2)),
                             self.tokens.count)  # fmt: skip
        self.between.put(made)
        return merged.flatten(1, 2)

    def _shown(self, x: Tensor, prompts: Tensor) -> Tensor:
        even = F.pad(x, (0, 0, 0, x.shape[2] % 2, 0, x.shape[1] % 2))
        squares = _rows(prompts, even.shape[2] // 2).repeat_interleave(2, 1).repeat_interleave(2, 2)
        return torch.cat([even, squares], 1)


class _Joining:
    """Behind a stage that views its result as a map: from here the prompts travel inside the tensor."""

    def __init__(self, between: Tap) -> None:
        self.between = between

    def after(self, args: Args, kwargs: Kwargs, out: Any) -> Any:
        return replace_output(out, join(first_output(out), self.between.take()))


class _Norm:
    """Around the norm behind the last block, which norms the prompts too."""

    def __init__(self, tokens: WindowTokens, end: Tap, pooling: _Pooling) -> None:
        self.tokens, self.end, self.pooling = tokens, end, pooling

    def around(self, forward: Callable[..., Any], args: Args, kwargs: Kwargs) -> Any:
        args, kwargs = replace_first(args, kwargs, join(first_tensor(args, kwargs), self.end.take()))
        x, prompts = split(forward(*args, **kwargs), self.tokens.count)
        self.pooling.prompts.put(prompts)
        return x


class _Pooling:
    """Behind the average pooling, which has seen the patches alone."""

    def __init__(self, pool: Pool) -> None:
        self.pool, self.prompts = pool, Tap()

    def after(self, args: Args, kwargs: Kwargs, out: Any) -> Any:
        x, pooled, prompts = first_tensor(args, kwargs), first_output(out), self.prompts.take()
        total = prompts.sum(1).view_as(pooled)
        if self.pool == "prompts":
            return replace_output(out, total / prompts.shape[1])
        positions = x.numel() // pooled.numel()
        return replace_output(out, (pooled * positions + total) / (positions + prompts.shape[1]))
