"""Meters: bytes kept for the backward, peak of the allocator, operations, and times of alternating runs.

Bytes and operations are exact and the same in every run. What is kept for the backward is seen by saved-tensor
hooks around the run, so what a layer hides from hooks (attributes of a context) is not counted; ``peak_bytes``
asks the allocator instead and sees everything that torch allocates.
"""

from __future__ import annotations

import gc
import os
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count


class Saved(NamedTuple):
    """One storage that autograd keeps.

    Attributes:
        bytes: Size of the whole storage, also when a view of it is what is kept.
        shape: Shape of the first tensor that was kept of it.
        dtype: Its type.
        label: What the caller's ``label`` said when it was first kept.
    """

    bytes: int
    shape: tuple[int, ...]
    dtype: torch.dtype
    label: str = ""


class Timing(NamedTuple):
    """What :func:`alternating` found for one variant.

    Attributes:
        seconds: Median seconds of a call.
        ratio: Median, over the rounds, of its time relative to the first variant's time in the same round.
    """

    seconds: float
    ratio: float


def saved_bytes(run: Callable[[], Any], own: Iterable[Tensor] = ()) -> int:
    """Bytes that autograd keeps for the backward of what ``run`` computes; see :func:`saved_tensors`."""
    return sum(one.bytes for one in saved_tensors(run, own))


def saved_tensors(
    run: Callable[[], Any], own: Iterable[Tensor] = (), *, label: Callable[[], str] | None = None
) -> list[Saved]:
    """What autograd keeps for the backward of what ``run`` computes, in the order of the forward.

    Every storage counts once, however many operations keep it. Works on the meta device and on fake tensors too.
    What is kept depends on the kernels that the device chooses: in inference mode the CPU's BatchNorm keeps no
    statistics and its fused attention no scores, where the meta device's keep both.

    Args:
        run: Runs the forward and returns what the backward would start from.
        own: Tensors that exist anyway and do not count: parameters, buffers, the input.
        label: Called when a storage is first kept, for example to name the layer that is running.
    """
    known = {part.untyped_storage()._cdata for tensor in own for part in _plain_parts(tensor)}
    kept: dict[int, tuple[Tensor, str]] = {}  # holds the tensors, so that no address is used twice

    def pack(tensor: Tensor) -> Tensor:
        for part in _plain_parts(tensor):
            storage = part.untyped_storage()._cdata
            if storage not in known and storage not in kept:
                kept[storage] = part, label() if label else ""
        return tensor

    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = run()
        found = [Saved(t.untyped_storage().nbytes(), tuple(t.shape), t.dtype, name) for t, name in kept.values()]
    del out
    return found


def peak_bytes(step: Callable[[], Any], device: torch.device | str = "cpu") -> int:
    """The most bytes that ``step`` held at once, above what was held before it, by the allocator's own count.

    On the CPU, memory that numpy allocates is not seen, nor that ``step`` frees what was there before it.

    Args:
        step: What is measured, usually a forward and a backward.
        device: ``cpu`` or a CUDA device.
    """
    gc.collect()
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        step()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # it reports its own start and stop on standard error otherwise
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        step()
    held = peak = 0
    events = profile.profiler.kineto_results.events()  # type: ignore[union-attr]
    for event in sorted((e for e in events if e.name() == "[memory]"), key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def flops(run: Callable[[], Any]) -> int:
    """Operations of ``run``: those of convolutions, matrix products and attention, a multiply-add as two.

    Where torch's own formulas are wrong or missing, others are used: the weight gradient of a grouped convolution,
    which torch counts as if it were not grouped, and the CPU's fused attention, which torch leaves out.
    """
    with FlopCounterMode(display=False, custom_mapping=_FORMULAS) as counter:
        run()
    return counter.get_total_flops()


def step_flops(loss: Callable[[], Tensor]) -> tuple[int, int]:
    """Operations of the forward and of the backward of ``loss``; the gradients are accumulated as usual."""
    held: list[Tensor] = []
    forward = flops(lambda: held.append(loss()))
    return forward, flops(held[0].backward)


def alternating(
    variants: dict[str, Callable[[], Any]],
    rounds: int = 7,
    clock: Callable[[], float] | None = None,
    *,
    warmup: int = 1,
    repeat: int = 1,
) -> dict[str, Timing]:
    """Times of variants that take turns, so that whatever slows the machine down slows all of them.

    Every other round runs them in reverse order.

    Args:
        variants: Name and what is timed; ratios refer to the first.
        rounds: Rounds that count.
        clock: Gives seconds; default: :func:`clock_of` the CPU, the process's own time.
        warmup: Calls of each variant before the first round.
        repeat: Calls in a row that are timed as one, for variants that take less than a millisecond.
    """
    now = clock or clock_of("cpu")
    for run in variants.values():
        for _ in range(warmup):
            run()
    times: dict[str, list[float]] = {name: [] for name in variants}
    names = list(variants)
    for turn in range(rounds):
        for name in names if turn % 2 == 0 else reversed(names):
            run, start = variants[name], now()
            for _ in range(repeat):
                run()
            times[name].append((now() - start) / repeat)
    base = times[names[0]]
    return {
        name: Timing(statistics.median(own), statistics.median(a / b for a, b in zip(own, base, strict=True)))
        for name, own in times.items()
    }


def clock_of(device: torch.device | str) -> Callable[[], float]:
    """A clock in seconds: the process's CPU time, or for CUDA the wall clock after the device has finished."""
    if torch.device(device).type != "cuda":
        return time.process_time

    def synchronised() -> float:
        torch.cuda.synchronize(device)
        return time.perf_counter()

    return synchronised


def _plain_parts(tensor: Tensor) -> Iterator[Tensor]:
    """The tensors that hold the data of a subclass (a quantised weight); an ordinary tensor is its own part."""
    if not is_traceable_wrapper_subclass(tensor):
        yield tensor
        return
    for name in tensor.__tensor_flatten__()[0]:
        yield from _plain_parts(getattr(tensor, name))


def _conv_backward(
    grad: Sequence[int],
    x: Sequence[int],
    weight: Sequence[int],
    _bias: Any,
    _stride: Any,
    _padding: Any,
    _dilation: Any,
    transposed: bool,
    _output_padding: Any,
    _groups: int,
    wanted: Sequence[bool],
    **_: Any,
) -> int:
    """Each of the two gradients takes as many operations as the forward, whatever the groups."""
    slides = torch.Size(x if transposed else grad).numel()
    return 2 * slides * torch.Size(weight[1:]).numel() * (wanted[0] + wanted[1])


def _attention(query: Sequence[int], key: Sequence[int], value: Sequence[int], *_: Any, **__: Any) -> int:
    return sdpa_flop_count(query, key, value)


def _attention_backward(
    grad: Sequence[int], query: Sequence[int], key: Sequence[int], value: Sequence[int], *_: Any, **__: Any
) -> int:
    return sdpa_backward_flop_count(grad, query, key, value)


_FORMULAS = {
    torch.ops.aten.convolution_backward: _conv_backward,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
}
