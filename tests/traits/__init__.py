"""What the tests know about each method: one JSON file per method that needs more than the defaults.

Keys: ``spec`` (options that fit the small images of the tests), ``variants`` (further options under which the
promises are checked), ``moved_start`` (why it does not start as the pretrained network), ``refused`` (family -> part of
the refusal).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

TRAITS: dict[str, dict[str, Any]] = {
    path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted(Path(__file__).parent.glob("*.json"))
}


def of(key: str) -> dict[str, Any]:
    """Method -> what its file says under ``key``, for the methods that say something."""
    return {name: traits[key] for name, traits in TRAITS.items() if key in traits}
