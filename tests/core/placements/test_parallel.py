"""Parallel: target += form(source), beside one layer or from one module to another."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import torchgraft as tg
from torchgraft.core.placements import MAP, Layout, Parallel, Point

from ..attaching import Remembered, assert_close, assert_every_tensor_learns, attach, disturb, first, run

X = torch.randn(2, 6, generator=torch.Generator().manual_seed(3))


class OverwritesItsInput(nn.Module):
    """A block as written in old research code: it works in place on what it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x.mul_(2).relu_())


class Chain(nn.Module):
    """Three layers in a row whose inputs and outputs the test can compute by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(torch.tanh(self.b(torch.tanh(self.a(x)))))


def _by_hand(model: Chain, form: nn.Linear, x: Tensor, source: Point, target: Point) -> Tensor:
    """The chain written out, with the branch read and added where the two points say."""
    seen: dict[Point, Tensor] = {}

    def meet(point: Point, value: Tensor) -> Tensor:
        seen[point] = value
        if point != target:
            return value
        return value + F.linear(seen[source], form.weight, form.bias)

    weights = {name: (module.weight, module.bias) for name, module in model.named_children()}
    for name in ("a", "b", "c"):
        x = meet(Point(name, "input"), x)
        x = meet(Point(name, "output"), F.linear(x, *weights[name]))
        x = torch.tanh(x) if name != "c" else x
    return x


PAIRS = [
    (Point("a", "input"), Point("a", "output")),
    (Point("a", "input"), Point("a", "input")),
    (Point("b", "output"), Point("b", "output")),
    (Point("a", "input"), Point("c", "output")),
    (Point("a", "input"), Point("b", "input")),
    (Point("a", "output"), Point("c", "input")),
    (Point("a", "output"), Point("b", "output")),
]


@pytest.mark.parametrize(("source", "target"), PAIRS, ids=lambda p: str(p))
def test_the_branch_of_one_point_is_added_at_another(source: Point, target: Point) -> None:
    torch.manual_seed(0)
    model, form = Chain().eval(), nn.Linear(6, 6)
    remembered = Remembered(model, X)
    wanted = _by_hand(model, form, X, source, target).detach()
    adapter = attach(model, lambda _: Parallel(form, source, target), X)
    assert_close(run(model, X), wanted)
    assert_every_tensor_learns(adapter, X)
    tg.detach(model)
    remembered.assert_same()


@pytest.mark.parametrize(("source", "target"), PAIRS, ids=lambda p: str(p))
def test_gradients_are_those_of_the_network_written_out(source: Point, target: Point) -> None:
    torch.manual_seed(0)
    model, form = Chain().eval(), nn.Linear(6, 6)
    wanted = torch.autograd.grad(_by_hand(model, form, X, source, target).square().sum(), form.parameters())
    attach(model, lambda _: Parallel(form, source, target), X)
    found = torch.autograd.grad(model(X).square().sum(), form.parameters())
    for a, b in zip(found, wanted, strict=True):
        assert_close(a, b)


def test_nothing_of_a_forward_is_kept_in_the_tap() -> None:
    model = Chain().eval()
    adapter = attach(model, lambda _: Parallel(nn.Linear(6, 6), *PAIRS[3]), X)
    model(X)
    assert adapter.placements[0][1].tap.value is None


def test_an_early_branch_sees_the_input_that_the_block_then_overwrites() -> None:
    torch.manual_seed(0)
    model, form = nn.Sequential(OverwritesItsInput()).eval(), nn.Linear(6, 6)
    wanted = (run(model, X.clone()) + F.linear(X, form.weight, form.bias)).detach()
    source, target = Point("0", "input"), Point("0", "output")
    attach(model, lambda _: Parallel(form, source, target, early=True), X.clone())
    assert_close(run(model, X.clone()), wanted)
    try:
        model(X.clone()).sum().backward()
    except RuntimeError as error:  # what the branch needs is overwritten: torch must say so
        assert "inplace operation" in str(error)
    else:
        assert_close(form.weight.grad, X.sum(0).expand(6, 6))


def test_a_branch_around_a_module_that_returns_a_tuple_changes_its_first_element() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(6, 6)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return self.fc(x), x

    class Root(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.two = Two()

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return self.two(x=x)

    model, form = Root().eval(), nn.Linear(6, 6)
    plain = model(X)
    attach(model, lambda _: Parallel(form, Point("two", "input"), Point("two", "output")), X)
    changed = model(X)
    assert_close(first(changed).detach(), (plain[0] + form(X)).detach())
    assert changed[1] is X


def test_a_source_that_runs_after_its_target_is_never_passed_over_in_silence() -> None:
    model = Chain().eval()
    with pytest.raises((tg.GraftError, RuntimeError), match=r"before|order|after"):
        attach(model, lambda _: Parallel(nn.Linear(6, 6), Point("c", "input"), Point("a", "output")), X)
        model(X)


def test_a_tapped_branch_at_a_module_that_runs_twice_is_refused() -> None:
    class Twice(Chain):
        def forward(self, x: Tensor) -> Tensor:
            return self.c(self.b(torch.tanh(self.b(self.a(x)))))

    model = Twice().eval()
    remembered = Remembered(model, X)
    with pytest.raises(tg.GraftError, match=r"'b' is called 2 times"):
        attach(model, lambda _: Parallel(nn.Linear(6, 6), Point("a", "input"), Point("b", "output")), X)
    remembered.assert_same()
    form = nn.Linear(6, 6)
    attach(model, lambda _: Parallel(form, Point("b", "input"), Point("b", "output")), X)
    h = model.a(X)
    for step in range(2):
        h = F.linear(h, model.b.weight, model.b.bias) + form(h)
        h = torch.tanh(h) if step == 0 else h
    assert_close(run(model, X), model.c(h).detach())


def test_a_module_that_is_never_called_is_refused_with_its_name() -> None:
    model = nn.Sequential(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)).eval()
    x, path = torch.randn(2, 5, 8), "0.self_attn.out_proj"
    remembered = Remembered(model, x)
    with pytest.raises(tg.GraftError, match=r"'0.self_attn.out_proj' is never called"):
        attach(model, lambda _: Parallel(nn.Linear(8, 8), Point(path, "input"), Point(path, "output")), x)
    remembered.assert_same()


# -- layouts --------------------------------------------------------------------------------------------


def test_a_map_stays_a_map() -> None:
    x = torch.randn(2, 3, 4, 5)
    assert MAP.to_map(x) is x
    assert MAP.from_map(x) is x


def test_a_channels_last_map_is_shown_with_channels_second() -> None:
    layout, x = Layout("N...C"), torch.randn(2, 4, 5, 3)
    assert torch.equal(layout.to_map(x), x.permute(0, 3, 1, 2))
    assert torch.equal(layout.from_map(layout.to_map(x)), x)


@pytest.mark.parametrize(("prefix", "grid"), [(0, (2, 3)), (1, (2, 3)), (5, (3, 2)), (2, None)])
def test_tokens_are_shown_as_their_grid_and_the_prefix_gets_nothing(prefix: int, grid: tuple[int, int] | None) -> None:
    h, w = grid or (2, 2)
    x = torch.randn(2, prefix + h * w, 3)
    layout = Layout("NLC", prefix, grid)
    shown = layout.to_map(x)
    assert shown.shape == (2, 3, h, w)
    for row in range(h):
        for column in range(w):
            assert torch.equal(shown[:, :, row, column], x[:, prefix + row * w + column])
    back = layout.from_map(shown)
    assert torch.equal(back[:, prefix:], x[:, prefix:])
    assert torch.equal(back[:, :prefix], torch.zeros(2, prefix, 3))


def test_tokens_of_another_image_size_form_another_grid() -> None:
    layout = Layout("NLC", 0, (2, 3))
    assert layout.to_map(torch.randn(1, 16, 3)).shape == (1, 3, 4, 4)  # a square image
    assert layout.to_map(torch.randn(1, 12 * 5, 3)).shape == (1, 3, 20, 3)  # the width of the site's grid
    with pytest.raises(tg.GraftError, match="7 tokens form no square grid"):
        layout.to_map(torch.randn(1, 7, 3))


def test_a_spatial_branch_runs_on_the_token_grid() -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(3, 3)).eval(), torch.randn(2, 1 + 6, 3)
    form = nn.Conv2d(3, 3, 3, padding=1)
    plain = run(model, x)
    source, target = Point("0", "input"), Point("0", "output")
    adapter = attach(model, lambda _: Parallel(form, source, target, layout=Layout("NLC", 1, (2, 3))), x)
    grid = x[:, 1:].reshape(2, 2, 3, 3).permute(0, 3, 1, 2)
    delta = form(grid).permute(0, 2, 3, 1).reshape(2, 6, 3)
    token = form(x[:, 0].reshape(2, 3, 1, 1)).reshape(2, 1, 3)  # the class token is an image of one pixel
    assert_close(run(model, x), (plain + torch.cat([token, delta], dim=1)).detach())
    assert_every_tensor_learns(disturb(adapter), x)


def test_source_and_target_may_hold_their_channels_differently() -> None:
    torch.manual_seed(0)

    class ToLast(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(x).permute(0, 2, 3, 1)

    model, x, form = nn.Sequential(ToLast()).eval(), torch.randn(2, 3, 5, 6), nn.Conv2d(3, 4, 1)
    plain = run(model, x)
    make = lambda _: Parallel(  # noqa: E731
        form, Point("0", "input"), Point("0", "output"), layout=MAP, out_layout=Layout("N...C")
    )
    attach(model, make, x)
    assert_close(run(model, x), (plain + form(x).permute(0, 2, 3, 1)).detach())
