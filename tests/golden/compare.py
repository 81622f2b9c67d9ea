"""The comparison rules of the golden cases: values, gradients and counts.

A float tensor is equal to the reference when every element satisfies
``|ours - expected| <= absolute + relative * max|expected|``, the maximum taken over the whole expected
tensor. Integer tensors are equal when they are identical. A gradient that was never computed counts as zeros.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Tolerance:
    """The four numbers of a case: for values, and (``grad_``) for gradients."""

    abs: float
    rel: float
    grad_abs: float
    grad_rel: float

    def times(self, factor: float) -> Tolerance:
        """A wider one for values."""
        return Tolerance(factor * self.abs, factor * self.rel, self.grad_abs, self.grad_rel)


def difference(name: str, ours: Tensor, expected: Tensor, *, absolute: float, relative: float) -> str | None:
    """Say where ``ours`` differs from ``expected``, or return None where it does not."""
    if ours.shape != expected.shape:
        return f"{name}: shape {tuple(ours.shape)}, expected {tuple(expected.shape)}"
    if expected.numel() == 0:
        return None
    if not expected.is_floating_point():
        wrong = int((ours != expected).sum())
        return f"{name}: {wrong} of {expected.numel()} integers differ" if wrong else None
    if ours.dtype != expected.dtype:
        return f"{name}: dtype {ours.dtype}, expected {expected.dtype}"
    if not bool(torch.isfinite(ours).all()):
        return f"{name}: holds values that are not finite"
    # In float64, so that the subtraction adds no rounding of its own.
    error = (ours.double() - expected.double()).abs()
    allowed = absolute + relative * float(expected.double().abs().max())
    worst = int(error.argmax())
    if float(error.flatten()[worst]) <= allowed:
        return None
    return (
        f"{name}: element {worst} is {float(ours.flatten()[worst]):.8g}, "
        f"expected {float(expected.flatten()[worst]):.8g}, error {float(error.flatten()[worst]):.3g}, "
        f"allowed {allowed:.3g}; {int((error > allowed).sum())} of {error.numel()} elements differ"
    )


def value_differences(ours: Mapping[str, Tensor], expected: Mapping[str, Tensor], tolerance: Tolerance) -> list[str]:
    """Compare outputs or state: both sides must hold the same names."""
    lines = [f"{name}: missing from ours" for name in sorted(expected.keys() - ours.keys())]
    lines += [f"{name}: not in the reference" for name in sorted(ours.keys() - expected.keys())]
    for name in sorted(expected.keys() & ours.keys()):
        line = difference(
            name,
            ours[name].detach(),
            expected[name],
            absolute=tolerance.abs,
            relative=tolerance.rel,
        )
        if line:
            lines.append(line)
    return lines


def gradient_differences(
    ours: Mapping[str, Tensor | None], expected: Mapping[str, Tensor], tolerance: Tolerance
) -> list[str]:
    """Compare the gradients that the reference lists; ours may hold more."""
    lines = []
    for name in sorted(expected):
        if name not in ours:
            lines.append(f"grad {name}: ours has no such tensor")
            continue
        gradient = ours[name]
        line = difference(
            f"grad {name}",
            torch.zeros_like(expected[name]) if gradient is None else gradient,
            expected[name],
            absolute=tolerance.grad_abs,
            relative=tolerance.grad_rel,
        )
        if line:
            lines.append(line)
    return lines


def count_differences(ours: Mapping[str, int], expected: Mapping[str, int | None], dead: int = 0) -> list[str]:
    """Compare parameter counts; a count that the reference leaves open (None) is not compared.

    Args:
        ours: Our counts.
        expected: Those of the reference.
        dead: Number of parameters that the official module owns and never uses, and that we do not have. The
            total contains them; the other counts may.
    """
    lines = []
    for name, number in expected.items():
        allowed = {ours[name] + dead} if name == "param_count" else {ours[name], ours[name] + dead}
        if number is not None and number not in allowed:
            also = f" and {dead} dead ones" if dead else ""
            lines.append(f"{name}: {ours[name]}{also}, expected {number}")
    return lines
