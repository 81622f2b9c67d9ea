"""Goals: bounds that a measurement has to stay within, so that a benchmark can fail a build."""

from __future__ import annotations

import dataclasses
from typing import Any


@dataclasses.dataclass(frozen=True)
class Goal:
    """An upper bound on a measured number.

    Attributes:
        name: What is bounded, as one reads it: ``"saved / full, conv-adapter, exact"``.
        value: What was measured.
        limit: The largest value that is allowed.
        advisory: The number moves from run to run (times), so missing it is told but is no failure.
    """

    name: str
    value: float
    limit: float
    advisory: bool = False

    @property
    def met(self) -> bool:
        """Whether the value is within the limit; a value that is not a number is not."""
        return self.value <= self.limit

    def to_dict(self) -> dict[str, Any]:
        """The goal and its outcome as plain data."""
        return {**dataclasses.asdict(self), "met": self.met}
