"""Added prompts: one vector per position, or one for all, in front of one block or of every block."""

from __future__ import annotations

import pytest
import timm.models as tm
import torch
from timm.models.mlp_mixer import MlpMixer
from torch import Tensor, nn

import torchgraft as tg

from .networks import count, images, tiny


def _vit(**options: object) -> nn.Module:
    torch.manual_seed(0)
    small = {"img_size": 16, "patch_size": 4, "embed_dim": 16, "depth": 3, "num_heads": 2, "num_classes": 5}
    return tm.VisionTransformer(**{**small, **options}).eval()  # type: ignore[arg-type]


def _run(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return model(x)


def _held(adapter: tg.Adapter) -> dict[str, Tensor]:
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.normal_()
    return {name.rpartition("prompts.")[2]: t for name, t in adapter.state_dict().items()}


def test_added_prompts_have_the_size_that_the_equation_says() -> None:
    assert count("vit_base_patch16_224", "vpt-add") == 197 * 768 == 151_296
    assert count("vit_base_patch16_224", "vpt-add[location=add-1]") == 768
    assert count("vit_base_patch16_224", "vpt-add[deep=true]") == 12 * 197 * 768 == 1_815_552
    assert count("vit_base_patch16_224", "vpt-add[location=add-1, deep=true]") == 9_216
    assert count("vit_base_patch16_224", "vpt-add[deep=true, shared=true]") == 197 * 768
    assert count("vit_base_patch16_224", "vpt-add[location=add-1, project=8]") == 8 + 8 * 768 + 768


@pytest.mark.parametrize("location", ["add", "add-1"])
@pytest.mark.parametrize(
    ("options", "rows"),
    [
        ("", ["first", None, None]),
        (", deep=true", ["first", "0", "1"]),
        (", deep=true, num_layers=2", ["first", "0", None]),
        (", deep=true, num_layers=2, reverse=true", [None, "0", "1"]),
        (", deep=true, shared=true", ["first", "first", "first"]),
    ],
)
def test_the_tokens_in_front_of_the_chosen_layers_are_shifted(location: str, options: str, rows: list) -> None:
    model, x = _vit(), images(2, 16)
    held = _held(tg.attach(model, f"vpt-add[location={location}{options}]"))
    found = _run(model, x)
    tg.activate(model, None)
    with torch.no_grad():
        h = model._pos_embed(model.patch_embed(x))
        for row, block in zip(rows, model.blocks, strict=True):
            added = 0 if row is None else held["first"] if row == "first" else held["deep.0"][int(row)]
            h = block(h + added)
        torch.testing.assert_close(found, model.head(model.norm(h)[:, 0]), rtol=1e-4, atol=1e-5)


def test_maps_of_windowed_tokens_get_a_prompt_per_position_too() -> None:
    model, x = tiny("swin"), images()
    adapter = tg.attach(model, "vpt-add[deep=true]")
    assert adapter.num_parameters() == 8 * 8 * 8 + 3 * 4 * 4 * 16
    held, seen = _held(adapter), []
    handle = model.layers[1].blocks[2].norm1.register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    with torch.no_grad():
        model(x)
        last = held["deep.1"].clone()
        adapter_parameter = dict(adapter.named_parameters())
        next(p for n, p in adapter_parameter.items() if n.endswith("deep.1"))[2].add_(1)
        model(x)
    handle.remove()
    torch.testing.assert_close(seen[1] - seen[0], torch.ones_like(seen[0]), rtol=1e-4, atol=1e-4)
    assert last.shape == (3, 16, 16)


def test_a_model_that_mixes_a_fixed_number_of_tokens_takes_them() -> None:
    model = MlpMixer(img_size=16, patch_size=4, num_blocks=2, embed_dim=8, num_classes=3).eval()
    assert tg.attach(model, "vpt-add[deep=true]").num_parameters() == 2 * 16 * 8
    assert _run(model, images(2, 16)).shape == (2, 3)


def test_dropout_acts_in_training_alone_and_in_each_image_apart() -> None:
    model, x = _vit(), images(1, 16).repeat(2, 1, 1, 1)
    _held(tg.attach(model, "vpt-add[dropout=0.5]"))
    first, second = model.train()(x).detach()
    assert not torch.allclose(first, second, atol=1e-4)
    torch.testing.assert_close(*_run(model.eval(), x))


def test_prompts_of_another_number_of_positions_are_an_error_that_names_both() -> None:
    model = _vit(dynamic_img_size=True)
    tg.attach(model, "vpt-add", example=((images(1, 16),), {}))
    with pytest.raises(tg.GraftError, match=r"vpt-add: made for 17 positions and got 37; resize the images.*add-1"):
        model(images(1, 24))
    tg.detach(model)
    tg.attach(model, "vpt-add[location=add-1]", example=((images(1, 16),), {}))
    assert _run(model, images(1, 24)).shape == (1, 5)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("vpt-add[project=0]", r"project=0.*at least 1"),
        ("vpt-add[dropout=-0.1]", r"dropout=-0.1.*from 0 to below 1"),
        ("vpt-add[deep=true, num_layers=0]", r"num_layers=0.*at least 1 block"),
        ("vpt-add[num_layers=2]", r"num_layers, reverse and shared need deep=true"),
        ("vpt-add[deep=true, num_layers=9]", r"num_layers=9, and 3 blocks are selected; give at most 3"),
    ],
)
def test_options_that_make_no_sense_are_refused(spec: str, message: str) -> None:
    with pytest.raises(tg.GraftError, match=message):
        tg.attach(_vit(), spec)


@pytest.mark.parametrize("option", ["project=4", "deep=true, shared=true"])
def test_what_needs_one_width_is_refused_where_there_are_several(option: str) -> None:
    with pytest.raises(tg.GraftError, match=r"needs blocks of one width, and here there are \[8, 16\]"):
        tg.attach(tiny("swin"), f"vpt-add[{option}]")
