from __future__ import annotations

import subprocess
import sys
import time

import pytest

from torchgraft.errors import GraftError

VERBS = ("demo", "train", "eval", "predict", "plan", "list", "inspect", "bench", "doctor")


def test_help_names_every_verb_and_shows_examples(cli):
    spoken = cli("--help")
    assert spoken.code == 0
    for verb in VERBS:
        assert f"\n  {verb} " in spoken.out
    assert "torchgraft demo" in spoken.out.split("Examples:")[1]


@pytest.mark.parametrize("verb", VERBS)
def test_help_of_a_verb_has_examples_that_start_with_the_verb(cli, verb):
    spoken = cli(verb, "--help")
    assert spoken.code == 0
    assert f"  torchgraft {verb}" in spoken.out.split("Examples:")[1]


def test_help_neither_loads_torch_nor_takes_a_second():
    code = (
        "import sys\nfrom torchgraft.cli import main\nsys.argv = ['torchgraft', '--help']\n"
        "try:\n    main()\nexcept SystemExit:\n    pass\n"
        "heavy = {'torch', 'timm', 'lightning', 'matplotlib', 'pydantic'} & set(sys.modules)\n"
        "sys.exit(f'loaded {heavy}' if heavy else 0)"
    )
    started = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert time.perf_counter() - started < 5


def test_the_module_runs_as_a_program():
    done = subprocess.run(
        [sys.executable, "-m", "torchgraft", "--version"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0
    assert done.stdout.startswith("torchgraft ")


def test_an_unknown_verb_names_the_nearest_one(cli):
    spoken = cli("trian", "photos")
    assert spoken.code == 2
    assert "'trian'" in spoken.err and "'train'" in spoken.err


def test_an_unknown_option_names_the_nearest_one(cli):
    spoken = cli("train", "photos", "--epocs", "3")
    assert spoken.code == 2
    assert "--epocs" in spoken.err and "--epochs" in spoken.err


def test_output_that_is_not_a_terminal_has_no_escape_codes(cli):
    for words in (["--help"], ["train", "--help"], ["trian"], ["list", "methods"]):
        spoken = cli(*words)
        assert "\x1b" not in spoken.out + spoken.err


@pytest.fixture
def failing(monkeypatch):
    """Makes ``torchgraft doctor`` raise what the test says."""

    def choose(error: BaseException) -> None:
        def fail() -> list:
            raise error

        monkeypatch.setattr("torchgraft.doctor.examine", fail)

    return choose


def test_a_mistake_of_the_user_is_one_line_and_exit_code_2(cli, failing):
    failing(GraftError("the answer is 41;\n  use 42"))
    spoken = cli("doctor")
    assert (spoken.code, spoken.out, spoken.err) == (2, "", "error: the answer is 41; use 42\n")


def test_a_full_disk_is_one_line_that_names_the_file_and_says_what_to_do(cli, failing):
    failing(OSError(28, "No space left on device", "runs/x/last.ckpt"))
    spoken = cli("doctor")
    assert spoken.code == 2
    assert spoken.err.startswith("error: No space left on device: runs/x/last.ckpt; ")
    assert "--out" in spoken.err and spoken.err.count("\n") == 1


def test_too_little_memory_is_one_line_that_says_what_to_do(cli, failing):
    failing(MemoryError())
    spoken = cli("doctor")
    assert spoken.code == 2
    assert "--batch-size" in spoken.err and spoken.err.count("\n") == 1


def test_a_mistake_of_torchgraft_says_so_in_one_line_and_has_another_exit_code(cli, failing):
    failing(KeyError("lost"))
    spoken = cli("doctor")
    assert spoken.code == 1
    assert "KeyError: 'lost'" in spoken.err and "--debug" in spoken.err and spoken.err.count("\n") == 1


def test_debug_shows_the_trace_before_the_line(cli, failing):
    failing(GraftError("wrong"))
    spoken = cli("--debug", "doctor")
    assert spoken.code == 2
    assert "Traceback" in spoken.err and spoken.err.endswith("error: wrong\n")


def test_an_interrupt_is_one_line_and_exit_code_130(cli, failing):
    failing(KeyboardInterrupt())
    spoken = cli("doctor")
    assert spoken.code == 130
    assert spoken.err.startswith("interrupted; ") and spoken.err.count("\n") == 1
