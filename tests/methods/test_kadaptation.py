"""KAdaptation: parameter counts, the sum of products and its factored form, shared matrices, biases."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers as hf
from torch import nn

import torchgraft as tg
from torchgraft.core.layers import ConvGeometry
from torchgraft.errors import GraftError
from torchgraft.methods.kadaptation import KAdaptation, KroneckerSum, slow_matrices

from .networks import count, images, tiny, train_step

VIT = "vit_base_patch16_224"

# -- counts ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "number"),
    [
        (KAdaptation(), 24 * 1_536 + 2 * 2 * 32**2),  # 40,960
        (KAdaptation(delta_bias=True), 40_960 + 24 * 768),
        (KAdaptation(slow_rank=None), 24 * 1_536 + 2 * 32**3),
        (KAdaptation(rank=2, n=16), 2 * 24 * 1_536 + 2 * 2 * 16**2),
    ],
)
def test_vit_base_has_the_number_of_parameters_of_the_formula(method: KAdaptation, number: int) -> None:
    assert count(VIT, method) == number


def test_the_published_number_is_ours_with_one_bias_for_q_and_v_and_the_mean_head() -> None:
    ours, biases, head = count(VIT, KAdaptation()), 12 * 768, 29_523
    assert ours + biases + head == 79_699


# -- the sum --------------------------------------------------------------------------------------------


def form(shape: tuple[int, ...], slow_rank: int | None, rank: int = 2) -> KroneckerSum:
    made = KroneckerSum(shape, slow_matrices(4, slow_rank), rank, scale=3.0)
    for parameter in made.parameters():
        nn.init.normal_(parameter)
    return made


@pytest.mark.parametrize("slow_rank", [1, 2, None])
def test_the_efficient_form_equals_the_sum_of_kronecker_products(slow_rank: int | None) -> None:
    made = form((24, 16), slow_rank)
    slow = made.slow if slow_rank is None else made.slow_left @ made.slow_right
    wanted = 3.0 * sum(torch.kron(slow[i], made.u[i] @ made.v[i]) for i in range(4))
    x = torch.randn(2, 3, 16)
    torch.testing.assert_close(made(), wanted.T)
    torch.testing.assert_close(made.along(x, None), x @ wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("slow_rank", [1, None])
@pytest.mark.parametrize(("kernel", "padding"), [(3, 1), (1, 0)])
def test_a_convolution_is_read_as_a_matrix(slow_rank: int | None, kernel: int, padding: int) -> None:
    conv = nn.Conv2d(8, 12, kernel, stride=2, padding=padding, bias=False)
    made = form(tuple(conv.weight.shape), slow_rank)
    x = torch.randn(2, 8, 9, 9)
    wanted = nn.functional.conv2d(x, made(), stride=2, padding=padding)
    torch.testing.assert_close(made.along(x, ConvGeometry.of(conv)), wanted, rtol=1e-4, atol=1e-3)


def test_the_fast_factors_get_a_gradient_at_the_first_step() -> None:
    # In the released code both start at zero, and neither ever gets one.
    adapter = tg.attach(tiny("test_vit"), KAdaptation(n=16, scale=1e5))
    adapter.model(images()).square().mean().backward()
    grads = {n: p.grad for n, p in adapter.named_parameters()}
    assert all(g.abs().max() > 0 for n, g in grads.items() if n.endswith(".v"))
    before = {n: p.detach().clone() for n, p in adapter.named_parameters()}
    train_step(adapter)
    train_step(adapter)
    assert all(not torch.equal(p, before[n]) for n, p in adapter.named_parameters() if n.endswith((".u", ".v")))


def test_an_image_does_not_depend_on_the_others_of_its_batch() -> None:
    # In the released code it does.
    adapter = tg.attach(tiny("test_vit"), KAdaptation(n=16, scale=1e4))
    train_step(adapter)
    batch = images(3)
    alone = adapter.model(batch[:1])
    batch[1:] = 5.0
    torch.testing.assert_close(adapter.model(batch)[:1], alone)


def test_the_merged_weights_and_biases_do_the_same() -> None:
    model = tiny("test_vit")
    adapter = tg.attach(model, KAdaptation(n=16, delta_bias=True, scale=1e4))
    train_step(adapter)
    before, path = model(images()), adapter.sites[0].path
    weight, bias = (
        t.detach().clone() for t in (model.get_submodule(path).weight, tiny("test_vit").get_submodule(path).bias)
    )
    report = tg.merge(model)
    assert report.complete
    torch.testing.assert_close(model(images()), before, rtol=1e-4, atol=1e-5)
    layer = model.get_submodule(path)
    d = layer.in_features
    assert torch.equal(layer.weight[d : 2 * d], weight[d : 2 * d])  # the keys
    assert torch.equal(layer.bias[d : 2 * d], bias[d : 2 * d])
    for rows in (slice(d), slice(2 * d, None)):
        assert not torch.equal(layer.weight[rows], weight[rows])
        assert not torch.equal(layer.bias[rows], bias[rows])


# -- where it goes --------------------------------------------------------------------------------------


def test_queries_and_values_have_slow_matrices_of_their_own_shared_by_all_layers() -> None:
    model = tiny("test_vit")
    adapter = tg.attach(model, KAdaptation(n=16))
    names = [n.rpartition(".")[2] for n in adapter.state_dict()]
    assert names.count("slow_left") == names.count("slow_right") == 2
    for twin in (model, copy.deepcopy(model)):
        forms = [(p.slot, p.form) for _, p in tg.adapters(twin)["default"].placements]
        assert len({id(f.slow_left) for slot, f in forms if slot == "q"}) == 1
        assert len({id(f.slow_left) for _, f in forms}) == 2


def test_an_n_that_does_not_divide_is_refused_with_one_that_does() -> None:
    message = r"kadaptation: n=48 does not divide the weight of '.*qkv' \(64 inputs, 64 outputs\); use a divisor of 64"
    with pytest.raises(GraftError, match=message):
        tg.attach(tiny("test_vit"), KAdaptation(n=48))


def test_a_network_without_attention_has_it_where_n_divides() -> None:
    adapter = tg.attach(tiny("test_convnext"), KAdaptation(n=8))
    weights = [p.form.shape for _, p in adapter.placements]
    assert weights
    assert not any(len(shape) == 4 and shape[1] == 1 for shape in weights)  # depthwise kernels: 49 inputs


def test_a_bias_that_is_not_there_is_no_place_for_a_change() -> None:
    config = hf.T5Config(d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2, vocab_size=30)
    model = hf.T5ForConditionalGeneration(config)
    with pytest.raises(GraftError, match=r"kadaptation: '.*SelfAttention.q' has no bias to change"):
        tg.attach(model, KAdaptation(n=4, delta_bias=True))
    assert len(tg.attach(model, KAdaptation(n=4)).sites) == 6


def test_torchs_own_attention_takes_changes_of_its_weights_and_biases() -> None:
    block = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    apart = nn.MultiheadAttention(16, 2, kdim=8, vdim=8)
    nn.init.normal_(apart.in_proj_bias)
    x, y = torch.randn(2, 5, 16), torch.randn(5, 1, 8)
    for module, example in ((block, (x,)), (Attends(apart), (torch.randn(5, 1, 16), y))):
        model = nn.ModuleDict({"layers": nn.ModuleList([module])})
        model.forward = module.forward  # type: ignore[method-assign]
        adapter = tg.attach(module, KAdaptation(n=4, delta_bias=True, targets=("q", "v")), example=(example, {}))
        before = module(*example)
        train = torch.optim.SGD(adapter.parameters(), lr=1.0)
        module(*example).square().mean().backward()
        assert all(p.grad is not None for p in adapter.parameters())
        train.step()
        assert not torch.equal(module(*example), before)


class Attends(nn.Module):
    def __init__(self, attention: nn.MultiheadAttention) -> None:
        super().__init__()
        self.attention = attention

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return self.attention(x, y, y)[0]


@pytest.mark.parametrize("wrong", [{"n": 0}, {"rank": 0}, {"slow_rank": 0}])
def test_sizes_below_one_are_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(GraftError, match=f"kadaptation: {next(iter(wrong))}=0 is not valid"):
        KAdaptation(**wrong)


def test_checkpoints_of_the_released_code_are_refused_with_the_reason() -> None:
    state = {"transformer.resblocks.0.attn.b": torch.zeros(4)}
    with pytest.raises(
        GraftError, match=r"kadaptation: checkpoints of the released code .* mixes the images of a batch"
    ):
        tg.load_official(tiny("test_vit"), state, system="kadaptation")
