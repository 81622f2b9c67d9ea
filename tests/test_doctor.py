from __future__ import annotations

from importlib import metadata

import pytest

from torchgraft import doctor


@pytest.fixture(scope="module")
def findings():
    return {finding.name: finding for finding in doctor.examine()}


def test_this_machine_is_sound(findings):
    assert [f for f in findings.values() if f.state == "broken"] == []


def test_versions_devices_threads_assets_and_extras_are_looked_at(findings):
    assert findings["torch"].detail == metadata.version("torch")
    assert "cores" in findings["threads"].detail
    assert {"cuda", "cuda:0"} & set(findings)
    assert any("sample:counting" in name for name in findings)
    assert "transformers" in findings and "dcnv3 on CPUs" in findings


def test_whatever_is_absent_says_what_to_do(findings):
    assert all(f.advice for f in findings.values() if f.state == "absent" and f.name != "mps")


def test_a_package_that_is_too_old_is_broken_and_has_a_remedy(monkeypatch):
    monkeypatch.setattr(doctor, "_requirements", lambda: [("timm", "999.0", "")])
    (finding,) = doctor._packages()
    assert finding.state == "broken" and "timm>=999.0" in finding.advice


def test_a_package_that_is_missing_is_broken_and_has_a_remedy(monkeypatch):
    monkeypatch.setattr(doctor, "_requirements", lambda: [("no-such-package", "1.0", "")])
    (finding,) = doctor._packages()
    assert finding.state == "broken" and finding.detail == "not installed"


def test_a_check_that_fails_is_a_finding_and_not_an_exception(monkeypatch):
    def _broken_check():
        raise RuntimeError("two\nlines")
        yield

    monkeypatch.setattr(doctor, "_CHECKS", (_broken_check,))
    (finding,) = doctor.examine()
    assert finding.state == "broken" and finding.detail == "RuntimeError: two lines"


@pytest.mark.parametrize(
    ("newer", "older"), [("2.14.1+cpu", "2.9"), ("1.0.31", "1.0.4"), ("3.0.dev2", "2.99"), ("6.0.2", "6.0")]
)
def test_versions_are_compared_by_number(newer, older):
    assert doctor._release(newer) > doctor._release(older)
