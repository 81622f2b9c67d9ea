from __future__ import annotations

import gzip
from pathlib import Path

import pytest
import torch

from torchgraft.errors import GraftError
from torchgraft.tasks.denseclip import ClipTokenizer, find_vocabulary
from torchgraft.tasks.denseclip.tokenizer import VOCABULARY_VARIABLE

# Made up; "lo w</w>" comes before "o w</w>", so that the order of the list matters.
MERGES = [("l", "o"), ("o", "w</w>"), ("lo", "w</w>"), ("e", "r</w>"), ("n", "e"), ("ne", "w"), ("new", "er</w>")]


@pytest.fixture
def tokenizer() -> ClipTokenizer:
    return ClipTokenizer(MERGES)


def test_ids_are_bytes_then_marked_bytes_then_merges_then_start_and_end(tokenizer: ClipTokenizer) -> None:
    assert tokenizer.encode("!") == [256]
    assert tokenizer.encode("&") == [261]  # as in the published vocabulary
    assert tokenizer.encode("a!") == [ord("a") - ord("!") + 256, 256]
    assert tokenizer.encode("low") == [512 + 2]
    assert tokenizer.encode("newer") == [512 + 6]
    assert (tokenizer.sot_id, tokenizer.eot_id) == (519, 520)


def test_it_agrees_with_transformers_on_the_same_merges(tokenizer: ClipTokenizer) -> None:
    transformers = pytest.importorskip("transformers")
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    single = [chr(b) for b in printable] + [chr(256 + i) for i in range(256 - len(printable))]
    symbols = [*single, *(s + "</w>" for s in single), *(a + b for a, b in MERGES)]
    symbols += ["<|startoftext|>", "<|endoftext|>"]
    theirs = transformers.CLIPTokenizer(vocab={s: i for i, s in enumerate(symbols)}, merges=MERGES)
    texts = [
        "low",
        "Lower newer",
        "new  low-er!",
        "it's 42 slow",
        "Öl über 漢字",
        "don't 'll",
        "a\tb\nlowlow",
        "½ x² é",
    ]
    for text in texts:
        assert [tokenizer.sot_id, *tokenizer.encode(text), tokenizer.eot_id] == theirs(text)["input_ids"], text


def test_short_texts_are_padded_with_zeros_and_long_ones_refused_or_cut(tokenizer: ClipTokenizer) -> None:
    ids = tokenizer(["low", "low low"], 5)
    assert ids.dtype == torch.int64
    assert ids.tolist() == [[519, 514, 520, 0, 0], [519, 514, 514, 520, 0]]
    with pytest.raises(GraftError, match="'low low low low' has 6 tokens"):
        tokenizer(["low low low low"], 5)
    assert tokenizer(["low low low low"], 5, truncate=True).tolist() == [[519, 514, 514, 514, 520]]


def test_class_names_get_five_columns_or_what_the_longest_needs(tokenizer: ClipTokenizer) -> None:
    assert tokenizer.class_tokens(["low"]).shape == (1, 5)
    assert tokenizer.class_tokens(["low", "low low low low"]).shape == (2, 6)
    with pytest.raises(GraftError, match="at most 69 fit into 77"):
        tokenizer.class_tokens(["low"], class_token_len=70)
    with pytest.raises(GraftError, match="69 were allowed"):
        tokenizer.class_tokens(["low " * 80])


def test_a_plain_file_a_gzipped_file_and_a_folder_give_the_same_ids(tmp_path: Path) -> None:
    lines = ["#version: 0.2", *(f"{a} {b}" for a, b in MERGES)]
    lines += [f"x{i} y{i}" for i in range(48894 - len(MERGES))]
    text = "\n".join([*lines, "not used"])
    (tmp_path / "merges.txt").write_text(text, encoding="utf-8")
    (tmp_path / "bpe.txt.gz").write_bytes(gzip.compress(text.encode()))
    plain = ClipTokenizer.from_file(tmp_path)
    packed = ClipTokenizer.from_file(tmp_path / "bpe.txt.gz")
    assert plain.encode("newer low") == packed.encode("newer low") == [518, 514]
    assert (packed.sot_id, packed.eot_id) == (49406, 49407)


def test_a_file_that_is_no_merge_list_is_refused_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("#version\na b\n")
    (tmp_path / "cut.gz").write_bytes(gzip.compress(b"a b\n" * 100)[:20])
    for name, reason in (("short.txt", "1 pairs found"), ("missing.txt", "no readable"), ("cut.gz", "no readable")):
        with pytest.raises(GraftError, match=reason) as caught:
            ClipTokenizer.from_file(tmp_path / name)
        assert "\n" not in str(caught.value)


def test_the_environment_names_the_vocabulary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VOCABULARY_VARIABLE, str(tmp_path))
    assert find_vocabulary() == tmp_path
