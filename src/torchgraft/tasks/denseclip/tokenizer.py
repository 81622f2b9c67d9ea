"""CLIP's byte-pair tokenizer, on a vocabulary that the user has.

Text is lower-cased and cut into words, numerals and runs of other signs; their UTF-8 bytes, each written as one
printable character and the last marked ``</w>``, are merged pair by pair in the order of the merge list. Ids: bytes,
marked bytes, the merges in order, start of text, end of text: 256 + 256 + 48894 + 2.

The merge list is no part of this package. It is read from OpenAI's ``bpe_simple_vocab_16e6.txt`` (or ``.txt.gz``) or
from the ``merges.txt`` of a Hugging Face CLIP tokenizer.

Source: "Learning Transferable Visual Models From Natural Language Supervision", arXiv 2103.00020.
"""

from __future__ import annotations

import gzip
import html
import importlib.util
import os
import unicodedata
from collections.abc import Iterable, Sequence
from functools import lru_cache
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor

from ...errors import GraftError

VOCABULARY_VARIABLE = "TORCHGRAFT_CLIP_VOCABULARY"
"""Environment variable that names the file of the merge list, or the folder with ``merges.txt``."""

CONTEXT_LENGTH = 77  # positions of every published CLIP text encoder
_MERGES = 49152 - 256 - 2  # entries of OpenAI's list that CLIP uses; the file holds more
_END = "</w>"
_CONTRACTIONS = ("'s", "'t", "'re", "'ve", "'m", "'ll", "'d")


class ClipTokenizer:
    """Text to token ids.

    Args:
        merges: Pairs of symbols in the order in which they are merged.

    Attributes:
        sot_id: Id of the start of text.
        eot_id: Id of the end of text, the largest.
    """

    def __init__(self, merges: Iterable[tuple[str, str]]) -> None:
        self._ranks = {pair: rank for rank, pair in enumerate(merges)}
        self._byte_symbols = _byte_symbols()
        # Ids follow the order in which the printable stand-ins were given out, printable bytes first.
        single = list(self._byte_symbols.values())
        symbols = [*single, *(f"{s}{_END}" for s in single), *(f"{a}{b}" for a, b in self._ranks)]
        self._ids = {symbol: number for number, symbol in enumerate(symbols)}
        self.sot_id, self.eot_id = len(symbols), len(symbols) + 1
        self._word_ids = lru_cache(maxsize=4096)(self._encode_word)

    @classmethod
    def from_file(cls, path: str | Path) -> ClipTokenizer:
        """Read a merge list: OpenAI's file, plain or gzipped, a ``merges.txt``, or the folder that holds one.

        Raises:
            GraftError: There is no such file, or it holds no CLIP merge list.
        """
        found = Path(path)
        found = found / "merges.txt" if found.is_dir() else found
        try:
            raw = found.read_bytes()
            text = (gzip.decompress(raw) if raw[:2] == b"\x1f\x8b" else raw).decode("utf-8")
        except (OSError, EOFError, UnicodeDecodeError) as error:
            raise GraftError(f"{found}: no readable merge list ({error}); {_wanted()}") from None
        lines = text.split("\n")[1 : _MERGES + 1]
        pairs = [tuple(line.split()) for line in lines]
        if len(pairs) < _MERGES or any(len(pair) != 2 for pair in pairs):
            held = sum(len(pair) == 2 for pair in pairs)
            raise GraftError(f"{found}: a header and {_MERGES} pairs were expected, {held} pairs found; {_wanted()}")
        return cls((first, second) for first, second in pairs)

    def encode(self, text: str) -> list[int]:
        """Ids of a text, without start and end."""
        return [number for word in _words(_clean(text)) for number in self._word_ids(word)]

    def __call__(self, texts: Sequence[str], context_length: int = CONTEXT_LENGTH, *, truncate: bool = False) -> Tensor:
        """Ids of several texts: start, text, end, zeros.

        Args:
            texts: K texts.
            context_length: Columns of the result.
            truncate: Cut longer texts, the last id being the end of text.

        Returns:
            (K, context_length), int64.

        Raises:
            GraftError: A text is longer and is not to be cut.
        """
        rows = torch.zeros(len(texts), context_length, dtype=torch.int64)
        for row, text in zip(rows, texts, strict=True):
            ids = [self.sot_id, *self.encode(text), self.eot_id]
            if len(ids) > context_length:
                if not truncate:
                    raise GraftError(
                        f"{text!r} has {len(ids)} tokens with start and end, {context_length} were allowed; "
                        "shorten it, allow more or pass truncate=True"
                    )
                ids = [*ids[: context_length - 1], self.eot_id]
            row[: len(ids)] = torch.tensor(ids)
        return rows

    def class_tokens(self, names: Sequence[str], *, n_ctx: int = 8, class_token_len: int | None = None) -> Tensor:
        """Ids of class names for :class:`~torchgraft.tasks.denseclip.LanguageGuided`.

        Args:
            names: K names, used as they are.
            n_ctx: Learnable contexts that share the text encoder's 77 positions.
            class_token_len: Columns, start and end included; default: 5, or what the longest name needs.

        Returns:
            (K, class_token_len), int64.

        Raises:
            GraftError: A name does not fit.
        """
        room = CONTEXT_LENGTH - n_ctx
        if class_token_len is None:
            class_token_len = min(room, max(5, *(len(self.encode(name)) + 2 for name in names)))
        if class_token_len > room:
            raise GraftError(f"class_token_len={class_token_len} with n_ctx={n_ctx}: at most {room} fit into 77")
        return self(names, class_token_len)

    def _encode_word(self, word: str) -> tuple[int, ...]:
        symbols = [self._byte_symbols[byte] for byte in word.encode("utf-8")]
        symbols[-1] += _END
        while len(symbols) > 1:
            best = min(pairwise(symbols), key=lambda pair: self._ranks.get(pair, len(self._ranks)))
            if best not in self._ranks:
                break
            symbols = _merged(symbols, best)
        return tuple(self._ids[symbol] for symbol in symbols)


def find_vocabulary() -> Path:
    """The merge list on this machine; nothing is downloaded.

    Looked for in this order: ``TORCHGRAFT_CLIP_VOCABULARY``, the package ``open_clip_torch``, the cache of
    ``huggingface_hub``.

    Raises:
        GraftError: There is none.
    """
    if named := os.environ.get(VOCABULARY_VARIABLE):
        return Path(named)
    spec = importlib.util.find_spec("open_clip")
    for folder in (spec.submodule_search_locations or []) if spec else []:
        if (packaged := Path(folder) / "bpe_simple_vocab_16e6.txt.gz").is_file():
            return packaged
    if importlib.util.find_spec("huggingface_hub"):
        from huggingface_hub import try_to_load_from_cache

        for repository in (
            "openai/clip-vit-base-patch32",
            "openai/clip-vit-base-patch16",
            "openai/clip-vit-large-patch14",
        ):
            cached = try_to_load_from_cache(repository, "merges.txt")
            if isinstance(cached, str):
                return Path(cached)
    raise GraftError(f"this machine has no CLIP vocabulary; {_wanted()}")


def _wanted() -> str:
    return (
        f"set {VOCABULARY_VARIABLE} to bpe_simple_vocab_16e6.txt.gz (it ships in open_clip_torch) "
        "or to the merges.txt of a CLIP tokenizer"
    )


def _byte_symbols() -> dict[int, str]:
    """Byte -> a printable character: itself where it is one, else one beyond U+00FF; printable bytes first."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}


def _clean(text: str) -> str:
    unescaped = html.unescape(html.unescape(text))
    return " ".join(unicodedata.normalize("NFC", unescaped).split()).lower()


def _words(text: str) -> list[str]:
    """Contractions, runs of letters, single numerals and runs of other signs, in this order of preference."""
    words: list[str] = []
    at = 0
    while at < len(text):
        end = at + 1
        if contraction := next((c for c in _CONTRACTIONS if text.startswith(c, at)), None):
            end = at + len(contraction)
        elif (kind := _kind(text[at])) in ("letter", "other"):
            while end < len(text) and _kind(text[end]) == kind:
                end += 1
        if not text[at].isspace():
            words.append(text[at:end])
        at = end
    return words


def _kind(character: str) -> str:
    if character.isspace():
        return "space"
    return {"L": "letter", "N": "number"}.get(unicodedata.category(character)[0], "other")


def _merged(symbols: list[str], pair: tuple[str, str]) -> list[str]:
    """Join every occurrence of a pair, from the left."""
    joined: list[str] = []
    at = 0
    while at < len(symbols):
        if tuple(symbols[at : at + 2]) == pair:
            joined.append(symbols[at] + symbols[at + 1])
            at += 2
        else:
            joined.append(symbols[at])
            at += 1
    return joined
