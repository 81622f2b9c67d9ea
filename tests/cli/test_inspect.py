from __future__ import annotations

import json
import shutil

from safetensors.numpy import load_file

from .conftest import BACKBONE, one_line_error


def test_json_holds_method_sites_tensors_bytes_backbone_and_classes(cli, run):
    facts = json.loads(cli("inspect", run / "adapter", "--json").out)
    tensors = load_file(run / "adapter" / "adapter_model.safetensors")
    assert facts["method"] == "conv-adapter" and facts["sites"]
    assert {t["name"]: tuple(t["shape"]) for t in facts["tensors"]} == {k: v.shape for k, v in tensors.items()}
    assert all(t["dtype"] == "F32" for t in facts["tensors"])
    assert facts["bytes"] == sum(f.stat().st_size for f in (run / "adapter").iterdir())
    assert facts["backbone"]["architecture"] == BACKBONE
    assert facts["task"]["classes"] == ["blue [x]", "red"]


def test_people_see_the_same_and_the_next_commands(cli, run):
    spoken = cli("inspect", run / "adapter")
    assert spoken.code == 0, spoken.err
    for words in ("conv-adapter", BACKBONE, "blue [x], red", "F32", f"torchgraft predict {run / 'adapter'}"):
        assert words in spoken.out


def test_a_folder_without_adapter_is_one_line(cli, tmp_path):
    assert str(tmp_path) in one_line_error(cli("inspect", tmp_path))


def test_missing_and_truncated_weights_are_one_line(cli, run, tmp_path):
    copy = shutil.copytree(run / "adapter", tmp_path / "adapter")
    weights = copy / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    assert "damaged" in one_line_error(cli("inspect", copy))
    weights.unlink()
    assert "adapter_model.safetensors" in one_line_error(cli("inspect", copy))
