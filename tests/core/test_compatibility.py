"""What else people do with a model goes on working: compile, export, DDP, feature extractors."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest
import timm
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn

import torchgraft as tg

NAMES = ["test_resnet", "test_convnext", "test_vit", "test_efficientnet"]


def visible(model: nn.Module) -> nn.Module:
    """Give every gain that starts at zero a value, or the branches behind it could not be seen."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1 and float(parameter.abs().max()) < 1e-4:
                parameter.fill_(0.3)
    return model


def adapted(name: str, method: str = "conv-adapter", **options: object) -> tuple[nn.Module, tg.Adapter, Tensor]:
    torch.manual_seed(0)
    model = visible(timm.create_model(name, **options).eval())
    side = model.pretrained_cfg["input_size"][-1]
    adapter = tg.attach(model, method, num_classes=5)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.normal_(std=0.1)
    return model, adapter, torch.randn(2, 3, side, side)


@pytest.mark.parametrize("name", NAMES)
def test_an_adapted_model_compiles_as_one_graph_and_trains(name: str) -> None:
    model, adapter, x = adapted(name)
    wanted = model(x)
    wanted.square().sum().backward()
    gradients = {n: p.grad.clone() for n, p in adapter.named_parameters() if p.grad is not None}
    model.zero_grad()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    found = compiled(x)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    found.square().sum().backward()
    for n, p in adapter.named_parameters():
        torch.testing.assert_close(p.grad, gradients[n], rtol=1e-4, atol=1e-4)


def test_a_model_compiled_before_attaching_notices_the_adapter() -> None:
    torch.manual_seed(0)
    model = visible(timm.create_model("test_resnet").eval())
    x = torch.randn(1, 3, 160, 160)
    compiled = torch.compile(model, backend="aot_eager")
    with torch.no_grad():
        plain = compiled(x)
        adapter = tg.attach(model, "conv-adapter")
        for parameter in adapter.parameters():
            parameter.normal_(std=0.1)
        assert not torch.allclose(compiled(x), plain)
        torch.testing.assert_close(compiled(x), model(x), rtol=1e-5, atol=1e-5)
        tg.activate(model, None)
        torch.testing.assert_close(compiled(x), plain, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_an_adapted_model_is_exported_with_its_adapter(name: str) -> None:
    model, _, x = adapted(name)
    with torch.no_grad():
        program = torch.export.export(model, (x,))
        torch.testing.assert_close(program.module()(x), model(x), rtol=1e-5, atol=1e-5)


def _worker(rank: int, port: int, folder: str) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo"}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=2)
    model, adapter, x = adapted("test_resnet")
    model.train()
    parallel = nn.parallel.DistributedDataParallel(model)
    parallel(x[rank : rank + 1]).square().mean().backward()
    if rank == 0:
        torch.save({n: p.grad for n, p in adapter.named_parameters()}, Path(folder) / "gradients.pt")
    dist.destroy_process_group()


def test_two_processes_give_the_gradients_of_the_whole_batch(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # Forked, since a spawned process could not import this file by its name.
    mp.start_processes(_worker, args=(port, str(tmp_path)), nprocs=2, start_method="fork")
    model, adapter, x = adapted("test_resnet")
    model.train()
    model(x).square().mean().backward()
    found = torch.load(tmp_path / "gradients.pt")
    for n, p in adapter.named_parameters():
        torch.testing.assert_close(found[n], p.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("options", [{}, {"feature_cls": "getter"}])
@pytest.mark.parametrize("name", NAMES)
def test_an_adapter_moves_to_the_feature_extractor_and_back(name: str, options: dict, tmp_path: Path) -> None:
    model, adapter, x = adapted(name)
    adapter.save(tmp_path / "there")
    extractor = timm.create_model(name, features_only=True, **options).eval()
    origin, twin = tg.anatomy(model), tg.anatomy(extractor)
    by_address = {origin.address(path): module for path, module in origin.modules.items()}
    with torch.no_grad():
        for path, module in twin.modules.items():
            source = by_address.get(twin.address(path))
            held = {} if source is None else {**source._parameters, **source._buffers}
            for key, tensor in {**module._parameters, **module._buffers}.items():
                if tensor is not None and held.get(key) is not None:
                    tensor.copy_(held[key])
    plain = [f.clone() for f in extractor(x)]
    loaded = tg.load(extractor, tmp_path / "there")
    assert any(not torch.allclose(a, b) for a, b in zip(extractor(x), plain, strict=True))
    assert set(loaded.state_dict()) == set(adapter.state_dict())
    loaded.save(tmp_path / "back")
    wanted = model(x)
    tg.detach(model)
    tg.load(model, tmp_path / "back")
    assert torch.equal(model(x), wanted)


def test_an_adapter_of_resnet18_refuses_resnet34_by_name(tmp_path: Path) -> None:
    tg.attach(timm.create_model("resnet18"), "conv-adapter").save(tmp_path)
    with pytest.raises(tg.GraftError, match=r"'resnet18'.*'resnet34'"):
        tg.load(timm.create_model("resnet34"), tmp_path)


def test_functional_calls_and_vmap_see_the_adapter() -> None:
    model, _, x = adapted("test_resnet")
    with torch.no_grad():
        wanted = model(x)
        state = {n: t.clone() for n, t in model.state_dict().items()}
        torch.testing.assert_close(torch.func.functional_call(model, state, (x,)), wanted)
        rows = torch.func.vmap(lambda image: model(image[None])[0])(x)
        torch.testing.assert_close(rows, wanted, rtol=1e-4, atol=1e-4)
