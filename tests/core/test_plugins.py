from __future__ import annotations

import dataclasses
import importlib
import importlib.metadata
import sys
import types

import pytest

import torchgraft as tg
from torchgraft.core.plugins import GROUP, load_plugins

method_module = importlib.import_module("torchgraft.core.method")

SOURCE = '''
import dataclasses
from torchgraft.core.method import Method, register

@register("from-elsewhere")
@dataclasses.dataclass(frozen=True)
class FromElsewhere(Method):
    """A method of another package."""
'''


@pytest.fixture
def entry_points(monkeypatch):
    """Pretend that packages with these entry points are installed; the registry is as before afterwards."""
    tg.methods()
    before = dict(method_module._registry)

    def install(**entries: str) -> None:
        listed = [importlib.metadata.EntryPoint(name, value, GROUP) for name, value in entries.items()]
        monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: listed if group == GROUP else [])
        load_plugins.cache_clear()

    yield install
    method_module._registry.clear()
    method_module._registry.update(before)
    load_plugins.cache_clear()


def test_a_method_of_another_package_is_known_by_its_name(entry_points, monkeypatch):
    module = types.ModuleType("elsewhere")
    monkeypatch.setitem(sys.modules, "elsewhere", module)
    entry_points(**{"a-plug-in": "elsewhere"})
    exec(SOURCE, module.__dict__)
    assert load_plugins() == ("a-plug-in",)
    assert "from-elsewhere" in tg.methods()
    assert dataclasses.is_dataclass(tg.method("from-elsewhere"))


def test_a_plug_in_that_cannot_be_imported_is_told_about_and_the_others_stay(entry_points):
    entry_points(broken="there_is_no_such_module")
    with pytest.warns(UserWarning, match=r"plug-in 'broken' \(there_is_no_such_module\) is left out: ModuleNotFound"):
        assert load_plugins() == ()
    assert "conv-adapter" in tg.methods()
