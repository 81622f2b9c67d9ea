"""WindowTokens: prompts in every window, between the blocks of a Swin and at its end."""

from __future__ import annotations

import pytest
import torch
from timm.models.swin_transformer import SwinTransformer, SwinTransformerBlock
from torch import Tensor, nn

import torchgraft as tg
from torchgraft.core.placements import WindowPath, WindowTokens
from torchgraft.core.placements.window_tokens import join, split

from ..attaching import Remembered, assert_close, assert_every_tensor_learns, attach, run


class Prompts(nn.Module):
    """Five prompts for each of three blocks."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.values = nn.ParameterList(torch.randn(5, width) for width in (8, 16, 16))

    def forward(self, index: int) -> Tensor:
        return self.values[index]


X = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def _swin() -> nn.Module:
    torch.manual_seed(0)
    model = SwinTransformer(
        img_size=32, patch_size=4, embed_dim=8, depths=(1, 2), num_heads=(1, 2), window_size=4, num_classes=3
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model.eval()


def _path(model: nn.Module) -> WindowPath:
    blocks = {n: m for n, m in model.named_modules() if isinstance(m, SwinTransformerBlock)}
    attentions = {f"{n}.attn": m.attn for n, m in blocks.items()}
    return WindowPath(blocks, attentions, {1: "layers.1.downsample"}, {}, "norm", "head.global_pool.pool")


@pytest.mark.parametrize("count", [1, 3, 9])
@pytest.mark.parametrize("shape", [(2, 6, 4), (2, 3, 5, 4)])
def test_prompts_travel_inside_a_tensor_and_come_out_as_they_were(count: int, shape: tuple[int, ...]) -> None:
    x, prompts = torch.randn(shape), torch.randn(2, count, 4)
    back, out = split(join(x, prompts), count)
    assert torch.equal(back, x)
    assert torch.equal(out, prompts)


@pytest.mark.parametrize("fresh", [[0], [0, 1, 2], [0, 2], [1], [2]])
@pytest.mark.parametrize("expand", [True, False])
def test_images_meet_their_own_prompts_alone(fresh: list[int], expand: bool) -> None:
    model, form = _swin(), Prompts()
    remembered = Remembered(model, X)
    attach(model, lambda _: WindowTokens(form, _path(model), 5, fresh=fresh, expand=expand), X)
    together = run(model, X)
    assert_close(together, torch.cat([run(model, image[None]) for image in X]))
    assert not torch.allclose(together, remembered.output, atol=1e-3)
    model(X).square().sum().backward()
    assert [i for i, v in enumerate(form.values) if v.grad is not None and v.grad.any()] == fresh
    model.zero_grad()
    tg.detach(model)
    remembered.assert_same()


def test_every_prompt_learns_through_windows_mergings_and_the_mean() -> None:
    model = _swin()
    adapter = attach(model, lambda _: WindowTokens(Prompts(), _path(model), 5, fresh=[0, 1, 2]), X)
    assert_every_tensor_learns(adapter, X)


def test_the_mean_over_prompts_and_patches_is_weighted_by_their_number() -> None:
    model = _swin()
    outputs = {}
    for pool in ("all", "patches", "prompts"):
        placed = WindowTokens(Prompts(), _path(model), 5, fresh=[0, 1, 2], pool=pool)  # type: ignore[arg-type]
        attach(model, lambda _, placed=placed: placed, X)
        outputs[pool] = run(model, X)
        tg.detach(model)
    # 4 x 4 patches at the end; the classifier is linear, so the mean passes through it.
    assert_close(outputs["all"], (16 * outputs["patches"] + 5 * outputs["prompts"]) / 21)


def test_prompts_that_stay_in_the_tensor_are_no_company_for_rows_without_them() -> None:
    path = _path(_swin())
    assert WindowTokens(Prompts(), path, 5, fresh=[0, 1, 2]).splits
    assert WindowTokens(Prompts(), path, 5, fresh=[0], expand=False).splits
    assert not WindowTokens(Prompts(), path, 5, fresh=[0]).splits


@pytest.mark.parametrize("layer", [nn.Linear(8, 8), nn.TransformerEncoderLayer(8, 2, 8), nn.Conv2d(8, 8, 1)])
def test_anything_but_a_block_around_a_known_window_attention_is_refused(layer: nn.Module) -> None:
    support = WindowTokens.supports(layer)
    assert not support.forward
    assert support.reason
