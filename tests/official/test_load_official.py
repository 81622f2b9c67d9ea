"""Official checkpoints are read into plain backbones; the numbers themselves are the golden cases' business."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import torchgraft as tg

from ..golden.builders import build
from ..golden.files import CaseFiles, read_case

CASES = Path(__file__).parents[1] / "golden" / "cases"
OPTIONS: dict[str, tuple[str, ...]] = {
    "conv_adapter_convnext": (),
    "conv_adapter_bit": (),
    "convpass_vit": ("scale",),
    "fact_tt_vit": ("scale",),
    "fact_tk_vit": ("scale",),
    "ssf_vit": (),
    "ssf_convnext": (),
    "vpt_vit_deep": (),
}
"""Cases whose state is a whole official checkpoint -> the options that its shapes do not tell."""


def plain(name: str) -> tuple[nn.Module, dict[str, Tensor], CaseFiles]:
    """Our backbone with the checkpoint's weights and nothing attached, the checkpoint, and the case."""
    files = read_case(CASES, name)
    case: Any = build(files)
    case.load(files.tensors["state"])
    tg.detach(case._model)
    return case._model, dict(files.tensors["state"]), files


def given(files: CaseFiles) -> dict[str, Any]:
    return {option: files.config[option] for option in OPTIONS[f"{files.name}"]}


@pytest.mark.parametrize("name", OPTIONS)
def test_a_whole_checkpoint_gives_the_reference_s_logits_on_a_plain_backbone(name: str) -> None:
    model, state, files = plain(name)
    tg.load_official(model, state, system=files.system, **given(files))
    with torch.no_grad():
        logits = model(files.tensors["input"]["image"])
    wanted = files.tensors["output"]["logits"]
    assert (logits - wanted).abs().max() <= 2e-5 + 1e-4 * wanted.abs().max()


@pytest.mark.parametrize(
    "wrap", [lambda s: {"state_dict": s}, lambda s: {"model": {f"module.{k}": v for k, v in s.items()}}]
)
def test_the_usual_wrappers_are_taken_off(wrap) -> None:
    model, state, files = plain("ssf_vit")
    adapter = tg.load_official(model, wrap(state), system="ssf")
    assert adapter.num_parameters() == files.counts["adapter_count"]


def test_another_backbone_is_told_apart_and_can_be_taken_over() -> None:
    model, state, files = plain("ssf_vit")
    with torch.no_grad():
        model.blocks[0].attn.qkv.weight.add_(1)  # type: ignore[index, union-attr]
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(tg.GraftError, match=r"backbone is another one: 'blocks.0.attn.qkv.weight' differs"):
        tg.load_official(model, state, system="ssf")
    assert not tg.adapters(model)
    assert all(torch.equal(t, before[k]) for k, t in model.state_dict().items())
    tg.load_official(model, state, system="ssf", backbone="ignore")
    tg.detach(model)
    tg.load_official(model, state, system="ssf", backbone="load")
    wanted = files.tensors["output"]["logits"]
    torch.testing.assert_close(model(files.tensors["input"]["image"]), wanted, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda s: s.pop("blocks.0.ssf_scale_1"), "the state holds nothing for"),
        (lambda s: s.update({"no_such.key": torch.zeros(1)}), "no_such.key"),
        (lambda s: s.update({"blocks.0.ssf_scale_1": torch.zeros(3)}), "does not fit"),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_refused_in_one_line_and_nothing_stays(change, words: str) -> None:
    model, state, _ = plain("ssf_vit")
    change(state)
    with pytest.raises(tg.GraftError, match=words) as error:
        tg.load_official(model, state, system="ssf")
    assert "\n" not in str(error.value)
    assert not tg.adapters(model)


def test_an_unknown_system_is_answered_with_the_nearest() -> None:
    with pytest.raises(tg.GraftError, match="'fact'"):
        tg.load_official(nn.Linear(1, 1), {}, system="fakt")
    with pytest.raises(tg.GraftError, match="holds no tensors"):
        tg.load_official(nn.Linear(1, 1), {"epoch": 3}, system="fact")
