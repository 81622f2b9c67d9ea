"""Methods as frozen records: their registry, their string form, and what it says about mistakes."""

from __future__ import annotations

import dataclasses
import json
import math
import string
from collections.abc import Iterator
from typing import ClassVar, Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import torchgraft as tg
from torchgraft.core.method import Combination, _registry, method_class, methods
from torchgraft.core.placements import Placement


@pytest.fixture(scope="module", autouse=True)
def toy() -> Iterator[type[tg.Method]]:
    """A method with a field of every type, known to the registry while this file runs."""
    tg.register("toy-of-the-tests")(Toy)
    yield Toy
    del _registry["toy-of-the-tests"]


@dataclasses.dataclass(frozen=True)
class Toy(tg.Method):
    name: ClassVar[str] = "toy-of-the-tests"
    rank: int = 4
    scale: float = 1.0
    scheme: Literal["one", "two", 3] = "one"
    targets: tuple[str, ...] = ("q", "v")
    sizes: tuple[int, ...] = ()
    act: str = "relu"
    norms: bool = False
    seed: int | None = None

    def placements(self, anatomy: tg.Anatomy) -> list[Placement]:
        return []


FIELDS = {
    "rank": st.integers(),
    "scale": st.floats(allow_nan=False),
    "scheme": st.sampled_from(["one", "two", 3]),
    "targets": st.lists(st.text(string.ascii_letters + string.digits + "_-.", max_size=8), max_size=3).map(tuple),
    "sizes": st.lists(st.integers(), max_size=3).map(tuple),
    "act": st.text(string.printable, max_size=8),
    "norms": st.booleans(),
    "seed": st.none() | st.integers(),
}


# -- round trips ----------------------------------------------------------------------------------------


@settings(max_examples=200, deadline=None)
@given(st.fixed_dictionaries({}, optional=FIELDS))
def test_the_string_form_gives_the_same_config_back(options: dict[str, object]) -> None:
    config = Toy(**options)  # type: ignore[arg-type]
    assert tg.method(str(config)) == config


@settings(max_examples=50, deadline=None)
@given(st.fixed_dictionaries({}, optional=FIELDS))
def test_plain_data_gives_the_same_config_back_through_json(options: dict[str, object]) -> None:
    config = Toy(**options)  # type: ignore[arg-type]
    assert Toy.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize(
    "config",
    [
        Toy(scale=1e-5),
        Toy(scale=1e20),
        Toy(scale=math.inf),
        Toy(scale=0.1 + 0.2),
        Toy(rank=-3),
        Toy(act="null"),
        Toy(act="true"),
        Toy(act="3"),
        Toy(act="a, b"),
        Toy(act="x]"),
        Toy(act=""),
        Toy(act="a + b"),
        Toy(act="it's"),
        Toy(targets=()),
        Toy(targets=("layer1.0.conv1", "fc")),
        Toy(targets=("1", "null")),
        Toy(sizes=(1, 2), targets=("a", "b"), scale=1e2, scheme=3, norms=True, seed=7),
    ],
    ids=str,
)
def test_awkward_values_survive_the_string_form(config: Toy) -> None:
    assert tg.method(str(config)) == config


def test_only_what_differs_from_the_default_is_written() -> None:
    assert str(Toy()) == "toy-of-the-tests"
    assert str(Toy(rank=8, norms=True, seed=0)) == "toy-of-the-tests[rank=8, norms=true, seed=0]"
    assert str(Toy(targets=("q",))) == "toy-of-the-tests[targets=[q]]"


@pytest.mark.parametrize("name", [n for n in methods() if n != "toy-of-the-tests"])
def test_the_default_of_every_method_of_the_library_survives_both_forms(name: str) -> None:
    config = method_class(name)()
    assert tg.method(str(config)) == tg.method(name) == config
    assert method_class(name).from_dict(json.loads(json.dumps(config.to_dict()))) == config


# -- reading --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "config"),
    [
        ("toy-of-the-tests", Toy()),
        ("  toy-of-the-tests [ rank = 8 ,norms=true ]  ", Toy(rank=8, norms=True)),
        ("toy-of-the-tests[]", Toy()),
        ("toy-of-the-tests[targets=[k, v, proj], rank=2]", Toy(targets=("k", "v", "proj"), rank=2)),
        ("toy-of-the-tests[targets=[], sizes=[1]]", Toy(targets=(), sizes=(1,))),
        ("toy-of-the-tests[scale=2]", Toy(scale=2)),
        ("toy-of-the-tests[scale=.5]", Toy(scale=0.5)),
        ("toy-of-the-tests[scale=1e-3]", Toy(scale=1e-3)),
        ("toy-of-the-tests[scale=1e+3, sizes=[1, 2]]", Toy(scale=1000.0, sizes=(1, 2))),
        ("toy-of-the-tests[scheme=3]", Toy(scheme=3)),
        ("toy-of-the-tests[seed=null]", Toy(seed=None)),
        ("toy-of-the-tests[act='a, [b] + c']", Toy(act="a, [b] + c")),
    ],
)
def test_the_string_form_is_read(text: str, config: Toy) -> None:
    assert tg.method(text) == config


def test_a_config_is_its_own_form_and_cannot_be_changed() -> None:
    config = Toy(rank=8)
    assert tg.method(config) is config
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.rank = 3  # type: ignore[misc]


# -- combinations ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "spec",
    [
        "toy-of-the-tests[rank=8] + conv-adapter",
        "toy-of-the-tests[rank=8]+conv-adapter",
        ["toy-of-the-tests[rank=8]", "conv-adapter"],
        [Toy(rank=8), tg.ConvAdapter()],
        (Toy(rank=8), "conv-adapter"),
    ],
    ids=str,
)
def test_several_methods_are_one_combination(spec: object) -> None:
    config = tg.method(spec)  # type: ignore[arg-type]
    assert config == Combination((Toy(rank=8), tg.ConvAdapter()))
    assert str(config) == "toy-of-the-tests[rank=8] + conv-adapter"
    assert tg.method(str(config)) == config
    assert Combination.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_one_method_in_a_list_is_that_method() -> None:
    assert tg.method(["toy-of-the-tests"]) == Toy()


def test_a_combination_of_combinations_survives_its_string_form() -> None:
    config = tg.method(["toy-of-the-tests + conv-adapter", "toy-of-the-tests[rank=8]"])
    assert tg.method(str(config)) == config
    assert str(config) == "toy-of-the-tests + conv-adapter + toy-of-the-tests[rank=8]"


@pytest.mark.parametrize("inner", ["scale=1e+3, sizes=[1, 2]", "sizes=[1, 2], scale=1e+3", "act='a + b', targets=[c]"])
def test_a_plus_inside_brackets_joins_nothing(inner: str) -> None:
    config = tg.method(f"toy-of-the-tests[{inner}] + conv-adapter[reduction=8]")
    assert isinstance(config, Combination)
    assert [p.name for p in config.parts] == ["toy-of-the-tests", "conv-adapter"]


# -- mistakes -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("conv-adaptor", "unknown method 'conv-adaptor'; did you mean 'conv-adapter'"),
        ("toy-of-the-tests[rnak=8]", "toy-of-the-tests: unknown option 'rnak'; did you mean 'rank'"),
        ("toy-of-the-tests[rank=four]", "toy-of-the-tests: rank='four' is not valid; expected a whole number"),
        ("toy-of-the-tests[rank=4.5]", "rank=4.5 is not valid; expected a whole number"),
        ("toy-of-the-tests[rank=true]", "rank=True is not valid; expected a whole number"),
        ("toy-of-the-tests[rank=]", "rank=None is not valid; expected a whole number"),
        ("toy-of-the-tests[scale=big]", "scale='big' is not valid; expected a number"),
        ("toy-of-the-tests[scheme=four]", "scheme='four' is not valid; expected one of 'one', 'two', 3"),
        ("toy-of-the-tests[scheme=3.0]", "scheme=3.0 is not valid; expected one of 'one', 'two', 3"),
        ("toy-of-the-tests[norms=1]", "norms=1 is not valid; expected true or false"),
        ("toy-of-the-tests[act=3]", "act=3 is not valid; expected a word"),
        ("toy-of-the-tests[targets=q]", "targets='q' is not valid; expected a list of a word"),
        ("toy-of-the-tests[targets=[1]]", r"targets=\[1\] is not valid; expected a list of a word"),
        ("toy-of-the-tests[seed=x]", "seed='x' is not valid; expected a whole number or null"),
        ("toy-of-the-tests[rank]", "cannot read the option 'rank'; expected name=value"),
        ("toy-of-the-tests[rank=4", r"cannot read the method 'toy-of-the-tests\[rank=4'"),
        ("toy-of-the-tests rank=4", "cannot read the method"),
        ("", "cannot read the method ''"),
        ("conv-adapter +", "cannot read the method ''"),
        ([], r"\[\] is no method"),
        (None, "None is no method"),
        (4, "4 is no method"),
        ([4], "4 is no method"),
        ({"rank": 4}, "is no method; expected a name such as"),
        (Toy, "is no method; expected a name such as"),
    ],
    ids=str,
)
def test_a_mistake_is_one_line_that_says_what_was_expected(spec: object, message: str) -> None:
    with pytest.raises(tg.GraftError, match=message) as raised:
        tg.method(spec)  # type: ignore[arg-type]
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    "text",
    [
        "[rank=4]]",
        "[rank=[4]",
        "[rank=(4]",
        "[act={]",
        "[act=*anchor]",
        "[act=@x]",
        "[act='x]",
        "[act=!!python/name:os.system ]",
        "[scale=.nan]",
        "[rank=4][norms=true]",
        "[rank=4, rank=8]",
    ],
)
def test_a_damaged_form_is_never_read_as_something_else(text: str) -> None:
    with pytest.raises(tg.GraftError) as raised:
        tg.method("toy-of-the-tests" + text)
    assert "toy-of-the-tests" in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    "values",
    [{"parts": 5}, {"parts": [1]}, {"parts": [{}]}, {"parts": [{"method": 5}]}, {"parts": []}, {}, {"prats": []}],
    ids=str,
)
def test_damaged_data_of_a_combination_is_an_error_for_people(values: dict[str, object]) -> None:
    with pytest.raises(tg.GraftError):
        Combination.from_dict(values)


# -- the registry ---------------------------------------------------------------------------------------


def test_the_registry_lists_methods_by_name_and_no_combination() -> None:
    known = methods()
    assert list(known) == sorted(known)
    assert known["conv-adapter"] is tg.ConvAdapter
    assert known["toy-of-the-tests"] is Toy
    assert Combination not in known.values()
    known.clear()
    assert "conv-adapter" in methods(), "a copy is handed out"


def test_the_registry_can_be_asked_by_its_public_name() -> None:
    import torchgraft.methods  # noqa: F401 - the package of the same name, which is imported sooner or later

    assert tg.methods() == methods()


def test_a_name_belongs_to_one_class() -> None:
    @dataclasses.dataclass(frozen=True)
    class Usurper(tg.Method):
        pass

    with pytest.raises(ValueError, match="'toy-of-the-tests' is registered already: Toy"):
        tg.register("toy-of-the-tests")(Usurper)
    assert methods()["toy-of-the-tests"] is Toy
    tg.register("toy-of-the-tests")(Toy)  # the same class again: a module that is reloaded


def test_a_method_without_placements_says_so() -> None:
    with pytest.raises(TypeError, match="Method defines no placements"):
        tg.Method().placements(None)  # type: ignore[arg-type]
