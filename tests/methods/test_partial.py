"""Partial fine-tuning: the last blocks of transformers, the last stages of ConvNets, and what stands behind."""

from __future__ import annotations

import pytest
import timm
import torch
from torch import nn

import torchgraft as tg

from .networks import tiny


def homes(adapter: tg.Adapter) -> set[str]:
    """The children of the model in which something trains, blocks of a sequence with their number."""
    return {".".join(s.path.split(".")[:2]) for s in adapter.sites}


def test_a_transformer_trains_its_last_blocks_the_final_norm_and_the_classifier() -> None:
    model = tiny("test_vit")
    depth = len(model.blocks)
    adapter = tg.attach(model, tg.Partial(k=2))
    assert homes(adapter) == {f"blocks.{depth - 2}", f"blocks.{depth - 1}", "norm", "head"}


def test_the_adapter_s_own_head_takes_the_place_of_the_classifier() -> None:
    adapter = tg.attach(tiny("test_vit"), tg.Partial(), num_classes=7)
    assert not any(s.path == "head" for s in adapter.sites)


def test_a_resnet_trains_its_last_stages() -> None:
    assert {h.partition(".")[0] for h in homes(tg.attach(tiny("test_resnet"), tg.Partial()))} == {"layer4", "fc"}
    two = tg.attach(tiny("test_resnet"), tg.Partial(k=2), num_classes=7)
    assert {h.partition(".")[0] for h in homes(two)} == {"layer3", "layer4"}


def test_a_convnext_stage_trains_with_its_downsampling() -> None:
    adapter = tg.attach(tiny("test_convnext"), tg.Partial(), num_classes=7)
    assert homes(adapter) == {"stages.3", "head.norm"}
    assert any("downsample" in s.path for s in adapter.sites)


def test_what_runs_behind_the_last_stage_of_an_efficientnet_trains_too() -> None:
    adapter = tg.attach(tiny("test_efficientnet"), tg.Partial(), num_classes=7)
    last = len(tiny("test_efficientnet").blocks) - 1
    assert homes(adapter) == {f"blocks.{last}", "conv_head", "bn2"}


def test_blocks_of_a_hierarchical_transformer_are_counted_across_stages() -> None:
    # Its stages have 1 and 3 blocks; the merging of patches between them comes with the fourth block.
    for k, merging in ((3, False), (4, True)):
        adapter = tg.attach(tiny("swin"), tg.Partial(k=k), num_classes=7)
        assert len({s.path.split(".blocks.")[0] + s.path.split(".blocks.")[-1][0] for s in adapter.sites
                    if ".blocks." in s.path}) == k  # fmt: skip
        assert any("downsample" in s.path for s in adapter.sites) == merging


def test_all_blocks_still_leave_the_stem_and_the_position_embedding_alone() -> None:
    model = tiny("test_vit")
    adapter = tg.attach(model, tg.Partial(k=len(model.blocks)), num_classes=7)
    trained = {s.path for s in adapter.sites}
    assert "" not in trained and not any(p.startswith("patch_embed") for p in trained)


@pytest.mark.parametrize(
    ("k", "message"), [(0, r"partial: k=0.*at least 1"), (9, r"partial: k=9.*has 4 stages; use k=1 to 4, or full")]
)
def test_a_number_that_the_network_does_not_have_is_refused(k: int, message: str) -> None:
    with pytest.raises(tg.GraftError, match=message):
        tg.attach(tiny("test_resnet"), f"partial[k={k}]")


def test_a_network_without_blocks_is_refused() -> None:
    with torch.device("meta"):
        model = timm.create_model("vgg11", num_classes=0)
    with pytest.raises(tg.GraftError, match=r"partial: VGG is no series of blocks"):
        tg.attach(model, tg.Partial())


def test_stages_that_lie_directly_in_the_model_are_found() -> None:
    class Block(nn.Module):
        def __init__(self, cin: int, cout: int) -> None:
            super().__init__()
            self.conv = nn.Conv2d(cin, cout, 3, padding=1)

        def forward(self, x):
            return self.conv(x).relu()

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Conv2d(3, 4, 3)
            self.first = nn.Sequential(Block(4, 4), Block(4, 4))
            self.block1, self.block2 = Block(4, 8), Block(8, 8)

        def forward(self, x):
            return self.block2(self.block1(self.first(self.stem(x))))

    adapter = tg.attach(Net(), tg.Partial())
    assert {s.path for s in adapter.sites} == {"block1.conv", "block2.conv"}
