"""One adapted network per cell, shared by the tests of the cell."""

from __future__ import annotations

import pytest

from .cells import CELLS, Cell


@pytest.fixture(scope="module", params=CELLS)
def cell(request: pytest.FixtureRequest) -> Cell:
    """The method on the family's network, disturbed, in eval mode; every test leaves it as it found it."""
    return Cell(*request.param)
