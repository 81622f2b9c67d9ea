"""Canonical addresses and selectors.

A canonical address names a module by its place in the anatomy instead of by its attribute names:
``stages[2].blocks[0].conv_dw`` is the same site in a classifier, in its ``features_only`` twin and inside a
detector. A selector is an address with slices, ``stages[2:].blocks[-2:]``.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Callable, Iterable

from ..errors import GraftError, nearest

_PART = re.compile(r"^(stages|blocks)\[(-?\d*)(:?)(-?\d*)\]$")


class Selection:
    """Which modules ``include`` and ``exclude`` name.

    Args:
        include: Patterns of which one must match; None: everything.
        exclude: Patterns of which none may match.
        counts: Number of blocks per stage (negative indices need it).
    """

    def __init__(
        self,
        include: str | Iterable[str] | None,
        exclude: str | Iterable[str] | None,
        counts: list[int],
    ) -> None:
        self.include = _listed(include, "include")
        self.exclude = _listed(exclude, "exclude") or []
        self.counts = counts
        self._tests = {p: self._compile(p) for p in [*(self.include or []), *self.exclude]}

    def __call__(self, path: str, address: str) -> bool:
        """Whether the module with this path and canonical address is chosen."""
        if any(self._tests[p](path, address) for p in self.exclude):
            return False
        return self.include is None or any(self._tests[p](path, address) for p in self.include)

    def explicit(self, path: str, address: str) -> bool:
        """Whether ``include`` names exactly this module, not a part of the model that holds it."""
        return self.include is not None and (path in self.include or address in self.include)

    def check(self, modules: Iterable[tuple[str, str]]) -> None:
        """Raise when a pattern matches no module at all.

        Args:
            modules: (path, address) of every module.

        Raises:
            GraftError: Names the pattern and the nearest path or address.
        """
        known = list(modules)
        for pattern, test in self._tests.items():
            if not any(test(p, a) for p, a in known):
                names = [p for p, _ in known if p] + [a for _, a in known if "[" in a]
                raise GraftError(
                    f"{pattern!r} names no module of this model; {nearest(pattern, names)} "
                    "(a path, a glob or an address such as 'stages[2:].blocks[-2:]'; see `torchgraft list sites`)"
                )

    def canonical(self, modules: Iterable[tuple[str, str]]) -> tuple[list[str] | None, list[str] | None]:
        """``include`` and ``exclude`` in a form that means the same on a twin with other module names.

        Paths and globs become addresses; a leading ``~`` marks an address that a glob named, so that it does
        not count as naming a layer exactly.

        Args:
            modules: (path, address) of every module.
        """
        known = list(modules)

        def rewrite(patterns: list[str] | None) -> list[str] | None:
            out: list[str] = []
            for pattern in patterns or []:
                exact = [a for p, a in known if pattern in (p, a)]
                if exact or any(_PART.match(part) for part in _split(pattern)):
                    out += exact[:1] or [pattern]
                else:
                    out += ["~" + a for p, a in known if self._tests[pattern](p, a)]
            return out if patterns else None

        return rewrite(self.include), rewrite(self.exclude)

    def _compile(self, pattern: str) -> Callable[[str, str], bool]:
        if pattern.startswith("~"):
            return lambda path, address: address == pattern[1:]
        if any(_PART.match(part) for part in _split(pattern)):
            wanted = _split(pattern)
            return lambda path, address: self._address_matches(wanted, _split(address))
        if any(c in pattern for c in "*?"):
            return lambda path, address: (
                fnmatch.fnmatchcase(path, pattern)
                or fnmatch.fnmatchcase(path, pattern + ".*")
                or fnmatch.fnmatchcase(address, pattern.replace("[", "[[]"))
            )
        return lambda path, address: _is_part(path, pattern) or _is_part(address, pattern)

    def _address_matches(self, wanted: list[str], parts: list[str]) -> bool:
        if len(parts) < len(wanted):
            return False
        stage = 0
        for want, part in zip(wanted, parts, strict=False):
            match, is_ = _PART.match(want), _PART.match(part)
            if match and is_ and match[1] == is_[1]:
                index = int(is_[2])
                total = len(self.counts) if match[1] == "stages" else self.counts[stage]
                if match[1] == "stages":
                    stage = index
                if not _in_range(index, total, match):
                    return False
            elif not fnmatch.fnmatchcase(part, want.replace("[", "[[]")):
                return False
        return True


def _in_range(index: int, total: int, match: re.Match[str]) -> bool:
    low, colon, high = match[2], match[3], match[4]
    if not colon:
        return index == int(low) % total if low and -total <= int(low) < total else False
    return index in range(total)[slice(int(low) if low else None, int(high) if high else None)]


def _is_part(path: str, whole: str) -> bool:
    return path == whole or path.startswith(whole + ".") or path.startswith(whole + "[")


def _split(address: str) -> list[str]:
    return address.split(".")


def _listed(patterns: str | Iterable[str] | None, name: str) -> list[str] | None:
    if patterns is None:
        return None
    listed = [patterns] if isinstance(patterns, str) else list(patterns)
    if not listed or not all(isinstance(p, str) and p for p in listed):
        raise GraftError(f"{name}={patterns!r}: expected a module path, a glob, an address, or a list of them")
    return listed
