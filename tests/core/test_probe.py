from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
import torchvision
from torch import Tensor, nn

import torchgraft as tg
from torchgraft.core.probe import dry_run, guesses, image_size, in_eval_mode, trace


def first_guess(model: nn.Module) -> Tensor:
    args, kwargs = next(guesses(model))
    return next(iter([*args, *kwargs.values()]))


class Noisy(nn.Module):
    """Draws random numbers even in eval mode, and has a BatchNorm and a dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.drop = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(self.norm(self.conv(x))) + torch.rand(1)


def test_a_dry_run_leaves_flags_buffers_hooks_gradients_and_random_numbers_as_they_were() -> None:
    model = Noisy().train()
    model.norm.eval()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    flags = [m.training for m in model.modules()]
    random = torch.get_rng_state()
    assert dry_run(model) is not None
    assert torch.equal(torch.get_rng_state(), random)
    assert [m.training for m in model.modules()] == flags
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert all(p.grad is None for p in model.parameters())


def test_a_failing_run_leaves_everything_as_it_was_too() -> None:
    model = Noisy().train()
    random = torch.get_rng_state()
    with pytest.raises(RuntimeError):
        trace(model, ((torch.zeros(1, 5, 8, 8),), {}))
    assert all(m.training for m in model.modules())
    assert not any(m._forward_hooks for m in model.modules())
    assert torch.equal(torch.get_rng_state(), random)


def test_a_trace_has_counts_shapes_and_order() -> None:
    shared = nn.Conv2d(4, 4, 1)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), shared, nn.ReLU(), shared)
    found = trace(model, ((torch.zeros(2, 3, 8, 8),), {}))
    assert found.calls["1"].count == 2
    assert (found.calls["0"].input, found.calls["0"].output) == ((2, 3, 8, 8), (2, 4, 6, 6))
    assert list(found.calls) == ["0", "1", "2", ""]
    assert [found.calls[p].order for p in found.calls] == [0, 1, 2, 3]
    assert found.input == (2, 3, 8, 8)
    assert found.fired("2") and not found.fired("4")


def test_the_example_that_was_run_is_kept() -> None:
    model = nn.Linear(7, 2)
    found = dry_run(model)
    assert found is not None
    assert found.example[0][0].shape == (1, 7)


@pytest.mark.parametrize(
    ("model", "shape"),
    [
        (nn.Sequential(nn.Conv1d(2, 4, 5), nn.Conv1d(4, 4, 3)), (1, 2, 64)),
        (nn.Sequential(nn.Conv3d(1, 4, 3), nn.Conv3d(4, 4, 3)), (1, 1, 8, 32, 32)),
        (nn.Sequential(nn.Linear(7, 9), nn.ReLU(), nn.Linear(9, 2)), (1, 7)),
        (nn.Sequential(nn.Embedding(11, 4), nn.Linear(4, 4)), (1, 8)),
        (nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten(), nn.Linear(4 * 26 * 26, 10)), (1, 1, 28, 28)),
        (nn.Sequential(nn.PixelUnshuffle(2), nn.Conv2d(12, 4, 3)), (1, 3, 64, 64)),
    ],
    ids=["conv1d", "conv3d", "linear", "embedding", "digits", "space to depth"],
)
def test_the_input_of_a_toy_network_is_guessed(model: nn.Module, shape: tuple[int, ...]) -> None:
    found = dry_run(model)
    assert found is not None
    assert found.input == shape


def test_a_network_that_takes_no_tensor_is_left_alone() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)

        def forward(self, batch: dict[str, Tensor]) -> Tensor:
            return self.conv(batch["image"])

    assert dry_run(Net()) is None
    found = tg.anatomy(Net())
    assert (found.trace, found.stem, found.sites[0].fires) == (None, "conv", None)
    assert tg.anatomy(Net(), example=(({"image": torch.zeros(1, 3, 8, 8)},), {})).sites[0].fires is True


@pytest.mark.parametrize(
    ("options", "shape"),
    [({}, (1, 3, 160, 160)), ({"in_chans": 1}, (1, 1, 160, 160)), ({"img_size": (48, 96)}, (1, 3, 48, 96))],
)
def test_the_input_of_a_timm_model_is_what_it_was_built_for(options: dict[str, Any], shape: tuple[int, ...]) -> None:
    found = dry_run(timm.create_model("test_vit", **options))
    assert found is not None
    assert found.input == shape


def test_windows_and_a_small_image_go_together() -> None:
    model = timm.create_model("swin_tiny_patch4_window7_224", img_size=32, window_size=2, depths=(1, 1, 1, 1),
                              embed_dim=12, num_heads=(1, 2, 2, 4))  # fmt: skip
    found = dry_run(model)
    assert found is not None
    assert found.input == (1, 3, 32, 32)


def test_the_size_that_is_asked_for_is_taken() -> None:
    found = dry_run(timm.create_model("test_resnet"), size=64)
    assert found is not None
    assert found.input == (1, 3, 64, 64)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_the_dtype_of_the_model_is_taken(dtype: torch.dtype) -> None:
    model = timm.create_model("test_efficientnet").to(dtype)
    assert first_guess(model).dtype == dtype
    assert dry_run(model) is not None


def test_a_model_without_data_runs_on_its_own_device() -> None:
    with torch.device("meta"):
        model = timm.create_model("resnet18")
    assert first_guess(model).device.type == "meta"
    assert dry_run(model) is not None


def test_a_detector_gets_a_list_of_small_images_and_keeps_its_transform() -> None:
    model = torchvision.models.detection.fasterrcnn_mobilenet_v3_large_320_fpn(weights=None, weights_backbone=None)
    before = model.transform.min_size, model.transform.max_size
    found = dry_run(model)
    assert found is not None
    assert found.calls["backbone.body.0.0"].input == (1, 3, 64, 64)
    assert found.input is None
    assert (model.transform.min_size, model.transform.max_size) == before


def test_image_sizes_come_from_whoever_names_one() -> None:
    assert image_size(timm.create_model("test_vit", img_size=64)) == (64, 64)
    assert image_size(timm.create_model("resnet10t")) == (176, 176)
    assert image_size(nn.Sequential(timm.create_model("resnet10t"))) == (176, 176)
    assert image_size(nn.Conv2d(3, 4, 3)) is None


def test_eval_mode_ends_with_the_block() -> None:
    model = nn.Sequential(nn.Dropout(), nn.Sequential(nn.Dropout())).train()
    model[1].eval()
    with in_eval_mode(model):
        assert not any(m.training for m in model.modules())
    assert [m.training for m in model.modules()] == [True, True, False, False]
