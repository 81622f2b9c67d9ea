"""Clips through an image model: how they are folded, averaged, told about, and routed."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import transformers as hf
from timm.models.resnet import BasicBlock, ResNet
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

import torchgraft as tg
from torchgraft.core.frames import MixesFrames, VideoWrapper
from torchgraft.errors import GraftError

from .attaching import disturb

SPEC = "st-adapter[width=4, pre_attn=true]"


def vit() -> nn.Module:
    torch.manual_seed(0)
    model = VisionTransformer(img_size=32, patch_size=8, embed_dim=16, depth=2, num_heads=2, num_classes=3)
    with torch.no_grad():
        for parameter in model.parameters():
            # So that frames differ, and their mean in front of the norm from that behind it.
            parameter.normal_(std=parameter[0].numel() ** -0.5) if parameter.dim() > 1 else parameter.normal_(1, 0.3)
    return model.eval()


def resnet() -> nn.Module:
    torch.manual_seed(0)
    return ResNet(BasicBlock, (1, 1, 1, 1), channels=(8, 8, 8, 8), num_classes=3).eval()


def clips(count: int = 2, frames: int = 4, side: int = 32) -> Tensor:
    return torch.randn(count, 3, frames, side, side, generator=torch.Generator().manual_seed(1))


def folded(video: Tensor) -> Tensor:
    """(B, 3, T, H, W) -> (B*T, 3, H, W), clip by clip, spelled out."""
    return torch.stack([video[b, :, t] for b in range(video.shape[0]) for t in range(video.shape[2])])


@pytest.mark.parametrize("make", [vit, resnet])
def test_a_plain_model_returns_the_mean_of_its_logits_over_the_frames(make) -> None:
    model, video = make(), clips()
    rows = model(folded(video))
    wanted = torch.stack([rows[:4].mean(0), rows[4:].mean(0)])
    torch.testing.assert_close(VideoWrapper(model)(video), wanted)
    torch.testing.assert_close(VideoWrapper(model, 4)(folded(video)), wanted)


def test_the_mean_can_be_taken_in_front_of_the_final_norm() -> None:
    # Bright frames weigh more there than behind the norm.
    model, video = vit(), clips() * torch.tensor([0.1, 1.0, 5.0, 25.0]).reshape(4, 1, 1)
    tokens = model.blocks(model.norm_pre(model._pos_embed(model.patch_embed(folded(video)))))
    token = torch.stack([tokens[:4, 0].mean(0), tokens[4:, 0].mean(0)])
    wanted = model.head(model.norm(token))
    wrapper = VideoWrapper(model, average="norm")
    torch.testing.assert_close(wrapper(video), wanted)
    assert not torch.allclose(VideoWrapper(model)(video), wanted, atol=5e-3)


def test_outside_the_wrapper_the_model_is_what_it_was() -> None:
    model, images = vit(), folded(clips())
    before, keys = model(images), list(model.state_dict())
    wrapper = VideoWrapper(model, average="norm")
    wrapper(clips())
    assert torch.equal(model(images), before)
    assert list(model.state_dict()) == keys
    assert isinstance(model.norm, nn.LayerNorm)
    with pytest.raises(AssertionError):
        wrapper(torch.randn(1, 3, 2, 30, 32))  # a call that fails leaves nothing behind either
    assert torch.equal(model(images), before)


def test_every_call_may_have_another_number_of_frames() -> None:
    model = vit()
    disturb(tg.attach(model, SPEC))
    wrapper = VideoWrapper(model)
    long, short = clips(1, 6), clips(3, 2)
    first = wrapper(long)
    wrapper(short)
    assert torch.equal(wrapper(long), first)


def test_the_wrapper_tells_the_forms_their_frames_and_the_models_own_option_holds_outside_of_it() -> None:
    model, video = vit(), clips(2, 4)
    disturb(tg.attach(model, f"{SPEC[:-1]}, frames=4]"))
    inside = VideoWrapper(model)(video)
    torch.testing.assert_close(model(folded(video)).unflatten(0, (2, 4)).mean(1), inside)
    assert not torch.allclose(VideoWrapper(model)(video[:, :, :2]), inside, atol=1e-3)
    assert all(m.told is None for m in model.modules() if isinstance(m, MixesFrames))


def test_clips_of_one_batch_do_not_see_each_other() -> None:
    model, video = vit(), clips(3, 4)
    disturb(tg.attach(model, SPEC))
    wrapper = VideoWrapper(model)
    together = wrapper(video)
    torch.testing.assert_close(torch.cat([wrapper(video[i : i + 1]) for i in range(3)]), together)


@pytest.mark.parametrize("average", ["output", "norm"])
def test_adapters_are_found_whether_attached_before_or_after_wrapping(average: str) -> None:
    def outputs(attach_first: bool) -> Tensor:
        model = vit()
        if attach_first:
            disturb(tg.attach(model, SPEC, num_classes=5))
        wrapper = VideoWrapper(model, average=average)  # type: ignore[arg-type]
        if not attach_first:
            torch.manual_seed(0)
            vit()
            disturb(tg.attach(model, SPEC, num_classes=5))
        return wrapper(clips())

    assert torch.equal(outputs(True), outputs(False))


@pytest.mark.parametrize("average", ["output", "norm"])
def test_clips_are_routed_by_one_name_each(average: str) -> None:
    model, video = vit(), clips(3, 4)
    for i, name in enumerate(("a", "b")):
        disturb(tg.attach(model, SPEC, name=name, num_classes=5), seed=i)
    wrapper = VideoWrapper(model, average=average)  # type: ignore[arg-type]
    names = ["b", "a", "b"]
    apart = []
    for i, name in enumerate(names):
        tg.activate(model, name)
        apart.append(wrapper(video[i : i + 1]))
    with tg.route(model, names):
        torch.testing.assert_close(wrapper(video), torch.cat(apart))


def test_routed_heads_of_different_sizes_need_the_mean_in_front_of_the_norm() -> None:
    model, video = vit(), clips(2, 4)
    for i, (name, classes) in enumerate((("a", 5), ("b", 7))):
        disturb(tg.attach(model, SPEC, name=name, num_classes=classes), seed=i)
    with (
        tg.route(model, ["b", "a"]),
        pytest.raises(GraftError, match=r"heads of different sizes.*wrap the model with average='norm'"),
    ):
        VideoWrapper(model)(video)
    wrapper = VideoWrapper(model, average="norm")
    with tg.route(model, ["b", "a"]):
        routed = wrapper(video)
    for i, name in enumerate(("b", "a")):
        tg.activate(model, name)
        torch.testing.assert_close(routed[i], wrapper(video[i : i + 1])[0])


def test_names_that_are_not_one_per_clip_are_refused() -> None:
    model = vit()
    tg.attach(model, SPEC, name="a")
    with tg.route(model, ["a"] * 8), pytest.raises(GraftError, match="2 clips and 8 names; give one name per clip"):
        VideoWrapper(model)(clips(2, 4))


def test_gradient_checkpointing_runs_the_forward_again_with_the_same_frames() -> None:
    model, video = vit(), clips(2, 4)
    adapter = disturb(tg.attach(model, SPEC, num_classes=5))
    wrapper = VideoWrapper(model).train()
    found = []
    for on in (False, True):
        model.set_grad_checkpointing(on)
        model.zero_grad()
        wrapper(video).square().mean().backward()
        found.append({n: p.grad.clone() for n, p in adapter.named_parameters() if p.grad is not None})
    assert list(found[0]) == list(found[1])
    for name, grad in found[0].items():
        torch.testing.assert_close(found[1][name], grad)


def test_what_a_model_of_transformers_returns_keeps_its_form() -> None:
    config = hf.ViTConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
                          image_size=32, patch_size=8, num_labels=3)  # fmt: skip
    model, video = hf.ViTForImageClassification(config).eval(), clips()
    out = VideoWrapper(model)(video)
    torch.testing.assert_close(out["logits"], model(folded(video))["logits"].unflatten(0, (2, 4)).mean(1))
    assert VideoWrapper(model, average="norm")(video)["logits"].shape == (2, 3)


def test_a_wrapped_model_can_be_copied_and_pickled() -> None:
    model, video = vit(), clips()
    disturb(tg.attach(model, SPEC))
    wrapper = VideoWrapper(model, average="norm")
    out = wrapper(video)
    for twin in (copy.deepcopy(wrapper), pickle.loads(pickle.dumps(wrapper))):
        assert torch.equal(twin(video), out)


@pytest.mark.slow
def test_a_wrapped_model_compiles_and_exports_in_one_graph() -> None:
    model, video = vit(), clips()
    disturb(tg.attach(model, SPEC))
    wrapper = VideoWrapper(model, average="norm")
    out = wrapper(video)
    compiled = torch.compile(wrapper, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(video), out)
    torch.testing.assert_close(compiled(video[:, :, :2]), wrapper(video[:, :, :2]))
    torch.testing.assert_close(torch.export.export(wrapper, (video,)).module()(video), out)


@pytest.mark.parametrize(
    ("frames", "shape", "text"),
    [
        (None, (8, 3, 32, 32), r"got clips of shape \(8, 3, 32, 32\); expected \(B, 3, T, H, W\)"),
        (4, (2, 3, 5, 32, 32), r"expected \(B, 3, 4, H, W\) or \(B\*4, 3, H, W\)"),
        (4, (6, 3, 32, 32), r"got clips of shape \(6, 3, 32, 32\)"),
    ],
)
def test_clips_of_another_shape_are_one_line_errors(frames: int | None, shape: tuple[int, ...], text: str) -> None:
    with pytest.raises(GraftError, match=text) as error:
        VideoWrapper(vit(), frames)(torch.zeros(shape))
    assert "\n" not in str(error.value)


def test_a_wrapper_that_cannot_be_is_refused() -> None:
    with pytest.raises(GraftError, match="frames=0; expected a whole number of at least 1"):
        VideoWrapper(vit(), 0)
    with pytest.raises(GraftError, match="average='head'; expected 'output' or 'norm'"):
        VideoWrapper(vit(), average="head")  # type: ignore[arg-type]
    with pytest.raises(GraftError, match="ResNet has no norm behind its blocks; use average='output'"):
        VideoWrapper(resnet(), average="norm")


def test_a_batch_that_is_no_whole_number_of_clips_is_a_one_line_error_and_a_single_image_is_a_still() -> None:
    model = vit()
    disturb(tg.attach(model, f"{SPEC[:-1]}, frames=4]"))
    with pytest.raises(GraftError, match="6 images is no whole number of clips of 4 frames") as error:
        model(torch.zeros(6, 3, 32, 32))
    assert "\n" not in str(error.value)
    image = folded(clips(1, 1))
    torch.testing.assert_close(model(image), VideoWrapper(model)(clips(1, 1)))
