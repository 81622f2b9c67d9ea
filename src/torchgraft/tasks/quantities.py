"""Numbers as people read them."""

from __future__ import annotations


def size(count: float) -> str:
    """Bytes in decimal units: ``612 kB``, ``4.2 MB``."""
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= 0.9995 * factor:
            value = count / factor
            return f"{value:.1f} {unit}" if value < 9.95 else f"{value:,.0f} {unit}"
    return f"{count:.0f} bytes"


def duration(seconds: float) -> str:
    """Seconds as ``8.4 s``, ``1 min 23 s`` or ``2 h 05 min``."""
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def percent(share: float) -> str:
    """A share in [0, 1] as per cent with as many decimals as it needs: ``87.0%``, ``0.23%``, ``0.004%``."""
    value = 100 * share
    if value == 0 or value >= 0.95:
        return f"{value:.1f}%"
    return f"{value:.2f}%" if value >= 0.0095 else f"{value:.1g}%"


def interval(share: float, count: int) -> tuple[float, float]:
    """The 95 % interval of a share that was seen in ``count`` independent cases.

    Wilson's score interval (E. B. Wilson, JASA 22, 1927), which stays inside [0, 1] and is sound for small
    counts and shares near 0 or 1.
    """
    if count <= 0:
        return 0.0, 1.0
    z = 1.959964
    centre = (share + z * z / (2 * count)) / (1 + z * z / count)
    half = z / (1 + z * z / count) * (share * (1 - share) / count + z * z / (4 * count * count)) ** 0.5
    return max(0.0, centre - half), min(1.0, centre + half)
