"""DCNv3 as an operator of PyTorch: compiled, exported, scripted, mapped, and under autocast."""

from __future__ import annotations

import io
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from torchgraft import GraftError
from torchgraft.ops import dcnv3

from .dcnv3_cases import Case, apart, gradients, leaves


class Sampler(nn.Module):
    """The operator between the linear layers of a block, as in the network."""

    def __init__(self, backend: str | None = None) -> None:
        super().__init__()
        self.value, self.offset, self.mask = nn.Linear(8, 8), nn.Linear(8, 36), nn.Linear(8, 18)
        self.backend = backend

    def forward(self, x: Tensor) -> Tensor:
        offset, mask = self.offset(x), self.mask(x)
        return dcnv3(self.value(x), offset, mask, kernel_size=3, groups=2, softmax=True, backend=self.backend)


@pytest.fixture
def sampler() -> Sampler:
    torch.manual_seed(0)
    return Sampler()


@pytest.fixture
def x() -> Tensor:
    return torch.randn(2, 5, 6, 8, generator=torch.Generator().manual_seed(1))


def test_the_checks_of_pytorch_pass_for_forward_and_backward() -> None:
    case = Case()
    inputs = leaves(*case.inputs(dtype=torch.float32))
    sizes = [[3, 3], [1, 1], [1, 1], [1, 1]]
    options = (*sizes, 2, 1.0, False, True, None)
    torch.library.opcheck(torch.ops.torchgraft.dcnv3, (*inputs, *options))
    arguments = (torch.randn(2, 5, 6, 8), *(t.detach() for t in inputs), *options, [False, True, True])
    torch.library.opcheck(torch.ops.torchgraft.dcnv3_backward, arguments)


SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in ("torch", "grid_sample", "reference")]


@pytest.mark.parametrize("backend", [None, *SLOW])
def test_a_module_compiles_whole_and_keeps_values_and_gradients(x: Tensor, backend: str | None) -> None:
    torch.manual_seed(0)
    module = Sampler(backend)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager", dynamic=True)
    for size in ((2, 5, 6, 8), (3, 7, 4, 8)):
        x = torch.randn(size)
        y, expected = compiled(x), module(x)
        assert apart(y, expected) < 1e-5
        parameters = list(module.parameters())
        for found, wanted in zip(gradients(y, parameters), gradients(expected, parameters), strict=True):
            assert torch.allclose(found, wanted, rtol=1e-4, atol=1e-4)


def test_an_exported_program_holds_one_operator_and_takes_other_sizes(sampler: Sampler, x: Tensor) -> None:
    sizes = {"x": {0: torch.export.Dim("n", min=2, max=64), 1: torch.export.Dim("h", min=3, max=99)}}
    program = torch.export.export(sampler, (x,), dynamic_shapes=sizes)
    assert [str(n.target) for n in program.graph.nodes if "torchgraft" in str(n.target)] == ["torchgraft.dcnv3.default"]
    other = torch.randn(4, 9, 6, 8)
    assert torch.equal(program.module()(other), sampler(other))


def test_a_scripted_module_is_saved_loaded_and_trained(sampler: Sampler, x: Tensor, tmp_path: Path) -> None:
    torch.jit.script(sampler).save(tmp_path / "sampler.pt")
    loaded = torch.jit.load(tmp_path / "sampler.pt")
    assert torch.equal(loaded(x), sampler(x))
    found = gradients(loaded(x), [loaded.value.weight, loaded.offset.weight])
    expected = gradients(sampler(x), [sampler.value.weight, sampler.offset.weight])
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_a_script_may_give_pairs_and_a_trace_keeps_the_operator(sampler: Sampler, x: Tensor) -> None:
    class Strided(Sampler):
        def forward(self, x: Tensor) -> Tensor:
            half = x[:, ::2, ::2]
            return dcnv3(self.value(x), self.offset(half), self.mask(half), (3, 3), stride=(2, 2), groups=2)

    strided = Strided()
    assert torch.equal(torch.jit.script(strided)(x), strided(x))
    traced = torch.jit.trace(sampler, x)
    assert "torchgraft::dcnv3" in str(traced.inlined_graph)
    assert torch.equal(traced(x), sampler(x))


def test_onnx_takes_the_form_of_grid_sample_at_any_size(x: Tensor) -> None:
    onnx = pytest.importorskip("onnx")
    from onnx.reference import ReferenceEvaluator

    torch.manual_seed(0)
    module, file = Sampler("grid_sample").eval(), io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("error", torch.jit.TracerWarning)
        warnings.filterwarnings("ignore", message="torch.tensor results are registered as constants")
        torch.onnx.export(
            module, (x,), file, input_names=["x"], dynamic_axes={"x": [0, 1, 2]}, opset_version=20, dynamo=False
        )
    model = onnx.load_from_string(file.getvalue())
    assert "GridSample" in {node.op_type for node in model.graph.node}
    for y in (x, torch.randn(1, 4, 7, 8)):
        (found,) = ReferenceEvaluator(model).run(None, {"x": y.numpy()})
        assert np.allclose(found, module(y).detach().numpy(), rtol=1e-4, atol=1e-5)


def test_on_the_meta_device_shapes_are_known_and_nothing_runs(sampler: Sampler) -> None:
    y = sampler.to("meta")(torch.empty(3, 400, 500, 8, device="meta"))
    assert y.shape == (3, 400, 500, 8)
    y.sum().backward()
    assert sampler.offset.weight.grad is not None
    with pytest.raises(GraftError, match=r"offset has shape"):
        dcnv3(*(t.to("meta") for t in Case().inputs()), groups=2, stride=2)


@pytest.mark.parametrize("softmaxed", [False, True], ids=["logits", "float32 weights"])
def test_autocast_runs_it_in_bfloat16(sampler: Sampler, x: Tensor, softmaxed: bool) -> None:
    expected = sampler(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mask = sampler.mask(x)
        if softmaxed:
            mask = mask.unflatten(-1, (2, 9)).softmax(-1, dtype=torch.float32).flatten(3)
        y = dcnv3(sampler.value(x), sampler.offset(x), mask, groups=2, softmax=not softmaxed)
    assert y.dtype == torch.bfloat16
    assert apart(y, expected) < 0.02
    for found, wanted in zip(gradients(y, [*sampler.parameters()]), gradients(expected, [*sampler.parameters()])):
        assert found.dtype == torch.float32
        assert float((found - wanted).norm() / wanted.norm()) < 0.05


def test_checkpointing_changes_no_gradient(sampler: Sampler, x: Tensor) -> None:
    parameters = list(sampler.parameters())
    expected = gradients(sampler(x), parameters)
    found = gradients(checkpoint(sampler, x, use_reentrant=False), parameters)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_second_derivatives_need_the_reference() -> None:
    case = Case(groups=1, channels=2, size=(3, 2))
    inputs = leaves(*case.inputs(n=1))
    (grad,) = torch.autograd.grad(dcnv3(*inputs, groups=1).square().sum(), inputs[1], create_graph=True)
    with pytest.raises(GraftError, match="second derivative; use backend='reference'"):
        grad.sum().backward()
    assert torch.autograd.gradgradcheck(
        lambda *t: dcnv3(*t, groups=1, softmax=True, backend="reference"), inputs, fast_mode=True
    )


def test_forward_mode_and_functional_gradients_need_the_reference() -> None:
    x, offset, mask = Case().inputs()

    def run(x: Tensor, backend: str | None = None) -> Tensor:
        return dcnv3(x, offset, mask, groups=2, backend=backend)

    for backend in (None, "torchvision", "grid_sample"):
        with pytest.raises(GraftError, match="forward-mode derivative; use backend='reference'"):
            torch.func.jvp(lambda x, name=backend: run(x, name), (x,), (x,))
    _, tangent = torch.func.jvp(lambda x: run(x, "reference"), (x,), (x,))
    assert apart(tangent, run(x)) < 1e-12  # linear in x
    found = torch.func.grad(lambda x: run(x, "reference").sum())(x)
    (leaf,) = leaves(x)
    assert apart(found, torch.autograd.grad(run(leaf).sum(), leaf)[0]) < 1e-12


def test_vmap_maps_over_tensors_and_over_gradients() -> None:
    case = Case()
    x, offset, mask = case.inputs()
    several = torch.stack([x, x.flip(0), 2 * x], 1)
    y = torch.func.vmap(lambda x: dcnv3(x, offset, mask, groups=2), in_dims=1)(several)
    for i in range(3):
        assert torch.equal(y[i], dcnv3(several[:, i], offset, mask, groups=2))
    inputs = leaves(x, offset, mask)
    inputs[1].requires_grad_(False)
    out, given = dcnv3(*inputs, groups=2), torch.randn(3, 2, 5, 6, 8, dtype=torch.float64)
    wanted = inputs[0], inputs[2]
    batched = torch.autograd.grad(out, wanted, given, is_grads_batched=True, retain_graph=True)
    for i in range(3):
        single = torch.autograd.grad(out, wanted, given[i], retain_graph=True)
        assert all(torch.equal(a[i], b) for a, b in zip(batched, single, strict=True))
