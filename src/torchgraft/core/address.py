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
from .blocks import Stage

_PART = re.compile(r"^(stages|blocks)\[(-?\d+)?(?:(:)(-?\d+)?(?::(-?\d+)?)?)?\]$")
_WORDS = "a path, a glob or an address such as 'stages[2:].blocks[-2:]'; see `torchgraft list sites`"


class Addresses:
    """The two-way table between module paths and canonical addresses of one model.

    Inside a block: ``stages[i].blocks[j].REST``, or ``blocks[j].REST`` in models that do not number their
    stages. Elsewhere in a stage: ``stages[i].REST``. Anywhere else: the path, relative to the module that
    holds the backbone, whose own address is empty; ``outer`` stands in front of an address that is taken.

    Args:
        paths: Every module path of the model.
        stages: Its stages.
        bases: Paths of the modules that hold the backbone, innermost first; what lies in one is named relative
            to it.
        names: Children that a feature extractor renamed (:func:`torchgraft.core.twins.original_names`).
    """

    def __init__(self, paths: Iterable[str], stages: list[Stage], bases: list[str], names: dict[str, str]) -> None:
        self._bases, self._names = [b for b in bases if b], names
        self._places: dict[str, str] = {}
        for i, stage in enumerate(stages):
            place = f"stages[{i}]" if stage.numbered else ""
            if place and stage.root:
                self._places[stage.root] = place
            for block in stage.blocks:
                self._places[block.path] = f"{place}.blocks[{block.index}]" if place else f"blocks[{block.index}]"
        self._addresses: dict[str, str] = {}
        self._paths: dict[str, str] = {}
        # What lies inside the backbone goes first: an address that two modules could have belongs to it.
        for path in sorted(["", *paths], key=self._depth):
            address = self._canonical(path)
            while address in self._paths:
                address = f"outer.{address}" if address else "outer"
            self._addresses[path], self._paths[address] = address, path

    def address(self, path: str) -> str:
        """Canonical address of the module at ``path``.

        Raises:
            GraftError: The model has no module there.
        """
        if path not in self._addresses:
            raise GraftError(f"this model has no module {path!r}; {nearest(path, self._addresses)}")
        return self._addresses[path]

    def path(self, address: str) -> str:
        """Module path of a canonical address.

        Raises:
            GraftError: No module of this model has the address.
        """
        if address not in self._paths:
            raise GraftError(f"this model has no site {address!r}; {nearest(address, self._paths)}")
        return self._paths[address]

    def _canonical(self, path: str) -> str:
        above = path
        while above:
            if above in self._places:
                return self._places[above] + path[len(above) :]
            above = above.rpartition(".")[0]
        base = next((b for b in self._bases if _is_inside(path, b)), "")
        path = path[len(base) + 1 :] if base else path
        first, dot, rest = path.partition(".")
        return self._names.get(first, first) + dot + rest

    def _depth(self, path: str) -> int:
        """0 for what lies in the innermost base, more for what lies further out."""
        return next((i for i, b in enumerate(self._bases) if _is_inside(path, b)), len(self._bases))


class Selection:
    """Which modules ``include`` and ``exclude`` name.

    A pattern is a module path or an address (with everything inside), a glob over either, or an address with
    slices. ``blocks[-2:]`` without a stage counts over the whole model.

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
        self._exact = {e for p in self.include or [] if not p.startswith("~") for e in (p, self._absolute(p))}

    def __call__(self, path: str, address: str) -> bool:
        """Whether the module with this path and canonical address is chosen."""
        if any(self._tests[p](path, address) for p in self.exclude):
            return False
        return self.include is None or any(self._tests[p](path, address) for p in self.include)

    def explicit(self, path: str, address: str) -> bool:
        """Whether ``include`` names exactly this module, not a part of the model that holds it."""
        return bool(self._exact) and any(name in self._exact for name in (path, address, self._staged(address)))

    def check(self, modules: Iterable[tuple[str, str]]) -> None:
        """Raise when a pattern matches no module at all.

        Args:
            modules: (path, address) of every module.

        Raises:
            GraftError: Names the pattern and the nearest path or address.
        """
        known = list(modules)
        for pattern, test in self._tests.items():
            if not pattern.startswith("~") and not any(test(p, a) for p, a in known):
                names = [p for p, _ in known if p] + [a for _, a in known if "[" in a]
                raise GraftError(f"{pattern!r} names no module of this model; {nearest(pattern, names)} ({_WORDS})")

    def canonical(self, modules: Iterable[tuple[str, str]]) -> tuple[list[str] | None, list[str] | None]:
        """``include`` and ``exclude`` in a form that means the same on a twin with other module names.

        A layer that is named exactly becomes its address; addresses whose slices count from the front stay;
        anything else becomes the addresses that it names, marked by a leading ``~``: such an address does
        not name a layer exactly, and a twin may lack it.

        Args:
            modules: (path, address) of every module.
        """
        known = [(p, a) for p, a in modules if p]
        parents = {p.rpartition(".")[0] for p, _ in known}

        def rewrite(patterns: list[str] | None) -> list[str] | None:
            out: list[str] = []
            for pattern in patterns or []:
                names = {pattern, self._absolute(pattern)}
                leaf = [a for p, a in known if p not in parents and names & {p, a, self._staged(a)}]
                if leaf or pattern.startswith("~") or self._counts_from_front(pattern):
                    out += leaf[:1] or [pattern]
                    continue
                chosen = [a for p, a in known if self._tests[pattern](p, a)]
                out += [f"~{a}" for a in _outermost(chosen)]
            return list(dict.fromkeys(out)) if patterns else None

        return rewrite(self.include), rewrite(self.exclude)

    def _compile(self, pattern: str) -> Callable[[str, str], bool]:
        if pattern.startswith("~"):
            return lambda path, address: _is_part(address, pattern[1:])
        parts = pattern.split(".")
        if any(_PART.match(part) for part in parts):
            if parts[0].startswith("blocks["):
                return lambda path, address: self._matches(["stages[:]", *parts], address, whole=True)
            return lambda path, address: self._matches(parts, address)
        if any(c in pattern for c in "*?["):
            glob = _literal_brackets(pattern)
            return lambda path, address: any(
                fnmatch.fnmatchcase(name, form)
                for name, form in ((path, pattern), (path, pattern + ".*"), (address, glob), (address, glob + ".*"))
            )
        return lambda path, address: _is_part(path, pattern) or _is_part(address, pattern)

    def _matches(self, wanted: list[str], address: str, *, whole: bool = False) -> bool:
        """Whether the address begins with what is wanted; ``whole``: block numbers count over the model."""
        parts = self._staged(address).split(".")
        if len(parts) < len(wanted):
            return False
        stage = 0
        for want, part in zip(wanted, parts, strict=False):
            match, is_ = _PART.match(want), _PART.match(part)
            if match and is_ and match[1] == is_[1]:
                index = int(is_[2])
                if match[1] == "stages":
                    stage, total = index, len(self.counts)
                elif whole:
                    index, total = index + sum(self.counts[:stage]), sum(self.counts)
                else:
                    total = self.counts[stage]
                if not _in_range(index, total, match):
                    return False
            elif not fnmatch.fnmatchcase(part, _literal_brackets(want)):
                return False
        return True

    def _absolute(self, pattern: str) -> str:
        """An address whose indices are single numbers, counted from the front and with its stage."""
        parts = self._staged(pattern).split(".")
        if pattern.startswith("blocks[") and len(self.counts) > 1:
            index = _single(parts[0], sum(self.counts))
            if index is None:
                return pattern
            home = next(i for i in range(len(self.counts)) if index < sum(self.counts[: i + 1]))
            return ".".join([f"stages[{home}]", f"blocks[{index - sum(self.counts[:home])}]", *parts[1:]])
        stage = _single(parts[0], len(self.counts))
        if stage is None:
            return pattern
        block = _single(parts[1], self.counts[stage]) if len(parts) > 1 else None
        rest = parts[1:] if block is None else [f"blocks[{block}]", *parts[2:]]
        return ".".join([f"stages[{stage}]", *rest])

    def _staged(self, address: str) -> str:
        """The address with its stage, in models of one stage that do not number it."""
        return f"stages[0].{address}" if address.startswith("blocks[") and len(self.counts) == 1 else address

    def _counts_from_front(self, pattern: str) -> bool:
        numbers = [_PART.match(part) for part in pattern.split(".")]
        slices = [m for m in numbers if m]
        whole = pattern.startswith("blocks[") and len(self.counts) > 1
        return bool(slices) and not whole and not any("-" in m[0] for m in slices)


def _in_range(index: int, total: int, match: re.Match[str]) -> bool:
    low, colon, high, step = match[2], match[3], match[4], match[5]
    if not colon:
        return index == _single(match[0], total)
    bounds = [int(n) if n else None for n in (low, high, step)]
    return bounds[2] != 0 and index in range(total)[slice(*bounds)]


def _single(part: str, total: int) -> int | None:
    """The number of a part without a slice, counted from the front; None when it is none or out of range."""
    match = _PART.match(part)
    if match is None or match[3] or match[2] is None or not -total <= int(match[2]) < total:
        return None
    return int(match[2]) % total


def _is_inside(path: str, base: str) -> bool:
    return path == base or path.startswith(base + ".")


def _is_part(path: str, whole: str) -> bool:
    return path == whole or path.startswith((whole + ".", whole + "["))


def _outermost(addresses: list[str]) -> list[str]:
    """The addresses that lie in no other of them."""
    kept: set[str] = set()
    for address in sorted(addresses, key=len):
        ends = [i for i, c in enumerate(address) if c in ".["]
        if not any(address[:i] in kept for i in ends):
            kept.add(address)
    return [a for a in addresses if a in kept]


def _literal_brackets(pattern: str) -> str:
    return pattern.replace("[", "[[]")


def _listed(patterns: str | Iterable[str] | None, name: str) -> list[str] | None:
    if patterns is None:
        return None
    listed = [patterns] if isinstance(patterns, str) else list(patterns)
    if not listed or not all(isinstance(p, str) and p for p in listed):
        raise GraftError(f"{name}={patterns!r}: expected a module path, a glob, an address, or a list of them")
    return listed
