"""FacT: parameter counts, the equations of both forms, shared factors, dropout, and official checkpoints."""

from __future__ import annotations

import copy
import pickle
import statistics
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file
from timm.models import VisionTransformer
from torch import Tensor, nn
from torchvision.models.vision_transformer import VisionTransformer as TorchvisionViT

import torchgraft as tg
from torchgraft.core.layers import ConvGeometry
from torchgraft.errors import GraftError
from torchgraft.methods.fact import FacTTK, FacTTT
from torchgraft.methods.forms.shared_factors import SharedFactors, TensorTrain, Tucker

from .networks import SIDE, count, images, tiny, train_step

VIT = "vit_base_patch16_224"
CASES = Path(__file__).parents[1] / "golden" / "cases"
TASKS = {  # released ranks of fact-tt and fact-tk per VTAB task, by group
    "natural": [(8, 32), (16, 32), (8, 16), (16, 32), (8, 16), (16, 32), (8, 16)],
    "specialized": [(8, 32), (8, 32), (8, 32), (8, 16)],
    "structured": [(16, 32), (4, 16), (16, 32), (16, 32), (16, 32), (16, 32), (16, 32), (8, 16)],
}

# -- counts ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rank", "published"), [(1, 1_680), (2, 3_648), (4, 8_448), (8, 21_504), (16, 61_440), (32, 196_608)]
)
def test_the_tensor_train_has_the_published_number_of_parameters(rank: int, published: int) -> None:
    assert count(VIT, FacTTT(rank=rank)) == published == 2 * 768 * rank + 144 * rank**2


@pytest.mark.parametrize(("rank", "published"), [(2, 3_368), (4, 6_784), (8, 13_952), (16, 30_976), (32, 86_528)])
def test_the_tucker_form_has_the_published_number_of_parameters(rank: int, published: int) -> None:
    assert count(VIT, FacTTK(rank=rank)) == published == 2 * 768 * rank + 144 * rank + rank**3


@pytest.mark.parametrize(
    ("targets", "published"),
    [
        (("qkv", "proj"), {4: 6_912, 8: 15_360, 16: 36_864, 32: 98_304}),
        (("fc1", "fc2"), {4: 7_680, 8: 18_432, 16: 49_152, 32: 147_456}),
    ],
)
def test_attention_or_mlp_alone_has_the_size_of_the_papers_figure_7(
    targets: tuple[str, ...], published: dict[int, int]
) -> None:
    assert {r: count(VIT, FacTTT(rank=r, targets=targets)) for r in published} == published


def test_swin_has_one_set_of_factors_per_stage() -> None:
    assert count("swin_base_patch4_window7_224", FacTTT(rank=16)) == 135_168  # the paper says 0.135 M


def test_the_released_ranks_give_the_sizes_of_the_papers_table_1() -> None:
    for column, method, published in ((0, FacTTT, 36_649), (1, FacTTK, 69_333)):
        sizes = {rank: count(VIT, method(rank=rank)) for ranks in TASKS.values() for rank in {r[column] for r in ranks}}
        groups = [statistics.mean(sizes[r[column]] for r in ranks) for ranks in TASKS.values()]
        assert round(statistics.mean(groups)) == published


# -- equations ------------------------------------------------------------------------------------------


def outer(d: int, rank: int) -> tuple[nn.Parameter, nn.Parameter]:
    return nn.Parameter(torch.randn(rank, d)), nn.Parameter(torch.randn(d, rank))


def tucker(shape: tuple[int, ...], *, reshaped: bool, start: int = 1) -> Tucker:
    u, v = outer(6, 4)
    c, p = nn.Parameter(torch.randn(4, 4, 4)), nn.Parameter(torch.randn(4, 9))
    return Tucker(shape, u, v, 0.5, 0.0, c=c, p=p, start=start, reshaped=reshaped)


def matrix(form: SharedFactors, inner: Tensor) -> Tensor:
    """The change of one d x d matrix, row-vector convention: s U S V^T."""
    return form.scale * form.u.T @ inner @ form.v.T


@pytest.mark.parametrize("blocks", [(1, 1), (3, 1), (1, 2)])
def test_a_tensor_train_changes_every_block_by_its_own_inner_factor(blocks: tuple[int, int]) -> None:
    outs, ins = blocks
    form = TensorTrain((6 * outs, 6 * ins), *outer(6, 4), scale=0.5, dropout=0.0)
    assert form.s.shape == (4 * outs, 4 * ins)
    delta = form().T  # (in, out)
    for i in range(outs):
        for j in range(ins):
            inner = form.s[4 * i : 4 * i + 4, 4 * j : 4 * j + 4].T
            torch.testing.assert_close(delta[6 * j : 6 * j + 6, 6 * i : 6 * i + 6], matrix(form, inner))


def test_the_papers_tucker_form_takes_one_column_of_p_per_block() -> None:
    up, down = tucker((24, 6), reshaped=False), tucker((6, 24), reshaped=False)
    for form, side in ((up, 1), (down, 0)):
        for j, block in enumerate(form().T.chunk(4, dim=side)):
            torch.testing.assert_close(block, matrix(form, form.c @ form.p[:, 1 + j]))


def test_the_released_tucker_form_reads_the_blocks_of_an_mlp_from_a_reshaped_slab() -> None:
    up, down = tucker((24, 6), reshaped=True), tucker((6, 24), reshaped=True)
    for form, side in ((up, 1), (down, 0)):
        slab = form.c @ form.p[:, 1:5]
        mixed = torch.stack([slab[:, m // 4, m % 4] for m in range(16)], dim=1)  # element (a, m), as the code has it
        for j, block in enumerate(form().T.chunk(4, dim=side)):
            inner = mixed[:, 4 * j : 4 * j + 4]
            torch.testing.assert_close(block, matrix(form, inner if side == 1 else inner.T))


def test_on_attention_both_layouts_are_the_same() -> None:
    model = tiny("test_vit")
    names = [s.path for s in tg.attach(model, FacTTK(rank=2, layout="official", targets=("qkv", "proj"))).sites]
    forms = [p.form for _, p in tg.adapters(model)["default"].placements]
    assert names
    assert not any(form.reshaped for form in forms)


@pytest.mark.parametrize("shape", [(6, 6), (24, 6), (6, 24)])
def test_acting_on_activations_equals_changing_the_weight(shape: tuple[int, int]) -> None:
    x = torch.randn(2, 3, shape[1])
    for form in (TensorTrain(shape, *outer(6, 4), scale=0.5, dropout=0.0), tucker(shape, reshaped=True)):
        torch.testing.assert_close(form.along(x, None), x @ form().T)


def test_a_pointwise_convolution_with_a_stride_is_a_matrix_too() -> None:
    conv = nn.Conv2d(6, 24, 1, stride=2, bias=False)
    form = TensorTrain(conv.weight.shape, *outer(6, 4), scale=0.5, dropout=0.0)
    x = torch.randn(2, 6, 5, 5)
    along = form.along(x, ConvGeometry.of(conv))
    torch.testing.assert_close(along, nn.functional.conv2d(x, form(), stride=2))


# -- shared factors -------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["fact-tt[rank=2]", "fact-tk[rank=2]"])
@pytest.mark.parametrize(("backbone", "widths"), [("test_vit", 1), ("swin", 2)])
def test_every_shared_factor_is_there_once_per_width(method: str, backbone: str, widths: int) -> None:
    adapter = tg.attach(tiny(backbone), method)
    shared = "uvcp" if "tk" in method else "uv"
    names = [name.rpartition(".")[2] for name in adapter.state_dict()]
    assert {name: names.count(name) for name in shared} == dict.fromkeys(shared, widths)
    forms = [placement.form for _, placement in adapter.placements]
    assert len({id(form.u) for form in forms}) == widths


def test_copies_share_among_themselves_and_with_nobody_else(tmp_path: Path) -> None:
    model = tiny("test_vit")
    adapter = tg.attach(model, "fact-tk[rank=2]", num_classes=3)
    train_step(adapter)
    adapter.save(tmp_path / "adapter")
    other = tiny("test_vit")
    tg.load(other, tmp_path / "adapter")
    fresh = tiny("test_vit")
    tg.attach(fresh, "fact-tk[rank=2]", num_classes=3)
    seen = {id(adapter.placements[0][1].form.u)}
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), other, fresh):
        forms = [p.form for _, p in tg.adapters(twin)["default"].placements if isinstance(p.form, SharedFactors)]
        own = {id(form.u) for form in forms}
        assert len(own) == 1
        assert not own & seen
        seen |= own
        if twin is not fresh:
            before = model(images())
            assert torch.equal(twin(images()), before)
            with torch.no_grad():
                forms[0].v.add_(1.0)
            assert not torch.equal(twin(images()), before)
            assert torch.equal(model(images()), before)


def test_an_adapter_on_a_part_of_the_model_keeps_its_factors_through_a_file(tmp_path: Path) -> None:
    adapter = tg.attach(tiny("test_vit"), "fact-tk[rank=2]", include="stages[0].blocks[-2:]", num_classes=3)
    columns = adapter.placements[0][1].form.p.shape[1]
    assert columns == 2 * (4 + 3 + 3)  # two blocks, an MLP of ratio 3
    assert sum(n.endswith(".u") for n in adapter.state_dict()) == 1
    train_step(adapter)
    adapter.save(tmp_path / "adapter")
    loaded = tg.load(tiny("test_vit"), tmp_path / "adapter")
    assert torch.equal(loaded.model(images()), adapter.model(images()))


# -- where it goes --------------------------------------------------------------------------------------


def test_an_mlp_whose_width_is_no_multiple_is_left_out() -> None:
    model = VisionTransformer(img_size=SIDE, patch_size=8, embed_dim=16, depth=2, num_heads=2, mlp_ratio=2.5)
    adapter = tg.attach(model, FacTTT(rank=2))
    assert {site.role for site in adapter.sites} == {"attn.qkv", "attn.proj"}
    with pytest.raises(GraftError, match="fact-tt: VisionTransformer has no selected weight"):
        tg.attach(model, FacTTT(rank=2, targets=("fc1", "fc2")), name="mlp")


def test_other_whole_ratios_have_as_many_blocks() -> None:
    model = VisionTransformer(img_size=SIDE, patch_size=8, embed_dim=16, depth=2, num_heads=2, mlp_ratio=3)
    assert tg.attach(model, FacTTT(rank=2)).num_parameters() == 2 * 16 * 2 + 2 * (4 + 2 * 3) * 2**2


@pytest.mark.parametrize("wrong", [{"rank": 0}, {"dropout": 1.0}])
def test_values_that_mean_nothing_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(GraftError, match=f"fact-tt: {next(iter(wrong))}="):
        FacTTT(**wrong)


# -- dropout --------------------------------------------------------------------------------------------


def test_dropout_acts_in_training_only() -> None:
    model = tiny("test_vit")
    train_step(tg.attach(model, FacTTT(rank=4, dropout=0.5)))
    assert torch.equal(model(images()), model(images()))
    model.train()
    assert not torch.equal(model(images()), model(images()))


def test_dropout_stands_between_the_inner_factor_and_v() -> None:
    eye = nn.Parameter(torch.eye(4))
    form = TensorTrain((4, 4), eye, eye, scale=1.0, dropout=0.5).train()
    x = torch.rand(100, 4) + 1.0
    code = x @ form.s.T
    y = form.along(x, None)
    kept = y != 0
    assert 0.3 < kept.float().mean() < 0.7
    torch.testing.assert_close(y[kept], 2 * code[kept])


def test_where_only_the_weight_is_seen_there_is_no_dropout() -> None:
    model = TorchvisionViT(image_size=SIDE, patch_size=8, num_layers=1, num_heads=2, hidden_dim=16, mlp_dim=32)
    nn.init.normal_(model.heads.head.weight)
    adapter = tg.attach(model, FacTTT(rank=4, dropout=0.5, targets=("qkv", "proj")))
    before = model(images())
    train_step(adapter)
    model.train()
    assert torch.equal(model(images()), model(images()))
    assert not torch.allclose(model(images()), before)


# -- official checkpoints -------------------------------------------------------------------------------


def golden_host() -> nn.Module:
    return timm.create_model(
        VIT, img_size=12, patch_size=4, embed_dim=32, depth=2, num_heads=4, num_classes=0, pretrained=False
    )


@pytest.mark.parametrize("case", ["fact_tt_vit", "fact_tk_vit"])
def test_an_official_checkpoint_gives_the_official_logits(case: str) -> None:
    tensors = load_file(CASES / f"{case}.safetensors")
    state = {k.removeprefix("state/"): t for k, t in tensors.items() if k.startswith("state/")}
    model = golden_host().eval()
    adapter = tg.load_official(model, state, system="fact", backbone="load", scale=0.5)
    assert adapter.method.name == case[:7].replace("_", "-")
    assert adapter.method.rank == 4
    torch.testing.assert_close(model(tensors["input/image"]), tensors["output/logits"], rtol=1e-4, atol=1e-5)


def test_a_checkpoint_without_its_scale_or_without_factors_is_refused() -> None:
    tensors = load_file(CASES / "fact_tt_vit.safetensors")
    state = {k.removeprefix("state/"): t for k, t in tensors.items() if k.startswith("state/")}
    with pytest.raises(GraftError, match="fact: the checkpoint does not hold its scale"):
        tg.load_official(golden_host(), state, system="fact")
    plain = {k: t for k, t in state.items() if "FacT" not in k}
    with pytest.raises(GraftError, match=r"fact: the state holds no 'FacTu\.weight'"):
        tg.load_official(golden_host(), plain, system="fact", scale=1.0)
