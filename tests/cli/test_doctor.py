from __future__ import annotations

import json

from torchgraft.doctor import Finding


def test_a_sound_machine_has_exit_code_0_and_names_the_demo(cli, monkeypatch):
    findings = [Finding("torch", "ok", "2.14"), Finding("cuda", "absent", "no GPU", "none is needed")]
    monkeypatch.setattr("torchgraft.doctor.examine", lambda: findings)
    spoken = cli("doctor")
    assert spoken.code == 0
    assert "none is needed" in spoken.out and "torchgraft demo" in spoken.out


def test_something_broken_has_exit_code_2_and_says_what_to_do(cli, monkeypatch):
    findings = [
        Finding("torch", "ok", "2.14"),
        Finding("timm", "broken", "not installed", "pip install timm"),
    ]
    monkeypatch.setattr("torchgraft.doctor.examine", lambda: findings)
    spoken = cli("doctor", "--json")
    assert spoken.code == 2
    document = json.loads(spoken.out)
    assert document["ok"] is False
    assert document["findings"][1]["advice"] == "pip install timm"
