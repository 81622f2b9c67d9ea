"""Every placement at every kind of layer: right against a formula of its own, or refused with a reason."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from timm.models.beit import Beit
from torch import Tensor, nn
from torchvision.models.swin_transformer import SwinTransformer

import torchgraft as tg
from torchgraft.core.layers import ConvGeometry
from torchgraft.core.placements import (
    PLACEMENTS,
    Affine,
    BatchStats,
    Input,
    KeyValue,
    Parallel,
    Placement,
    Point,
    Replace,
    Sequential,
    Stream,
    Tokens,
    Train,
    WeightDelta,
    WindowTokens,
    affine_for,
)
from torchgraft.core.placements.window_tokens import WindowPath
from torchgraft.methods.forms import ConvBottleneck

from .attaching import Remembered, assert_close, assert_every_tensor_learns, attach, disturb, run
from .layer_kinds import CONVS, LAYERS, NORMS, build, inputs

TOKEN_LAYERS = ("linear", "layernorm", "transformer encoder layer")


class Given(nn.Module):
    """A form without an input: it returns its one tensor."""

    def __init__(self, shape: tuple[int, ...] | torch.Size, scale: float = 0.3) -> None:
        super().__init__()
        self.value = nn.Parameter(scale * torch.randn(tuple(shape)))

    def forward(self) -> Tensor:
        return self.value


class Mix(nn.Module):
    """A linear map over the channels of a map or of tokens; any other axis stays."""

    def __init__(self, width: int, out: int, axis: int) -> None:
        super().__init__()
        self.linear, self.axis = nn.Linear(width, out), axis

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x.movedim(self.axis, -1)).movedim(-1, self.axis)


class Wider(nn.Module):
    """What may stand in for any layer: the plain output, made different by a factor per channel."""

    def __init__(self, layer: nn.Module, width: int, axis: int) -> None:
        super().__init__()
        self.layer, self.mix = copy.deepcopy(layer), Mix(width, width, axis)

    def forward(self, x: Tensor) -> Tensor:
        return self.mix(self.layer(x))


class Case:
    """One layer, its inputs, and what is known about it without asking the library."""

    def __init__(self, kind: str) -> None:
        self.kind, self.layer, self.inputs = kind, build(kind), inputs(kind)
        self.axis = -1 if kind in TOKEN_LAYERS else 1
        self.width = self.inputs[0].shape[self.axis]
        self.out = run(self.layer, self.inputs[0]).shape[self.axis]


def _channels(case: Case, value: Tensor) -> Tensor:
    return value if case.axis == -1 else value.view(-1, *[1] * (case.inputs[0].dim() - 2))


def _parallel(case: Case, layer: nn.Module) -> Placement:
    if case.kind in CONVS:
        form: nn.Module = ConvBottleneck(case.width, case.out, 2, ConvGeometry.of(layer))
    else:
        form = Mix(case.width, case.out, case.axis)
    return Parallel(form, Point("0", "input"), Point("0", "output"))


def _delta(case: Case, layer: nn.Module) -> Placement:
    return WeightDelta.on(layer, "0", Given(getattr(layer, "weight", torch.zeros(1)).shape))


def _train(case: Case, layer: nn.Module) -> Placement:
    return Train("0", {n: p for n, p in layer._parameters.items() if p is not None})


def _with_weights(layer: nn.Module, weights: dict[str, Tensor]) -> nn.Module:
    changed = copy.deepcopy(layer)
    for name, value in weights.items():
        changed._parameters[name] = nn.Parameter(value.detach().clone())
    return changed


def _delta_by_hand(case: Case, p: WeightDelta, x: Tensor) -> Tensor:
    if "standardised" not in case.kind:
        return _with_weights(case.layer, {"weight": case.layer.weight + p.form.value})(x)
    conv = case.layer
    if "same" in case.kind:
        sides = []
        for size, k, s in zip(x.shape[2:], conv.kernel_size, conv.stride, strict=True):
            total = max((-(-size // s) - 1) * s + k - size, 0)
            sides = [total // 2, total - total // 2, *sides]
        y = F.conv2d(F.pad(x, sides), p.form.value, None, conv.stride, 0, conv.dilation, conv.groups)
    else:
        y = F.conv2d(x, p.form.value, None, conv.stride, conv.padding, conv.dilation, conv.groups)
    return conv(x) + y


def _tokens_by_hand(case: Case, p: Tokens, x: Tensor) -> Tensor:
    y = case.layer(torch.cat([x[:, :1], p.form.value.expand(len(x), -1, -1), x[:, 1:]], 1))
    return torch.cat([y[:, :1], y[:, 4:]], 1)


# How a placement is made for a layer, and what the layer must then return.
Make = Callable[[Case, nn.Module], Placement]
Formula = Callable[..., Tensor]
KINDS: dict[type[Placement], tuple[Make, Formula]] = {
    Parallel: (_parallel, lambda c, p, x: c.layer(x) + p.form(x)),
    Sequential: (
        lambda c, layer: Sequential(Mix(c.out, c.out, c.axis), Point("0", "output")),
        lambda c, p, x: c.layer(x) + p.form(c.layer(x)),
    ),
    Stream: (
        lambda c, layer: Stream(Mix(c.width, c.width, c.axis), Point("0", "input")),
        lambda c, p, x: c.layer(x + p.form(x)),
    ),
    Input: (
        lambda c, layer: Input(Mix(c.width, c.width, c.axis), "0"),
        lambda c, p, x: c.layer(p.form(x)),
    ),
    Affine: (
        lambda c, layer: (
            affine_for(layer, "0")
            if c.kind != "transformer encoder layer"
            else Affine("0", nn.Parameter(torch.ones(4)), nn.Parameter(torch.zeros(4)), axis=-1)
        ),
        lambda c, p, x: c.layer(x) * _channels(c, p.scale) + _channels(c, p.shift),
    ),
    WeightDelta: (_delta, _delta_by_hand),
    Train: (_train, lambda c, p, x: _with_weights(c.layer, p.owned())(x)),
    Replace: (
        lambda c, layer: Replace("0", Wider(c.layer, c.out, c.axis)),
        lambda c, p, x: p.form.mix(p.form.layer(x)),
    ),
    Tokens: (lambda c, layer: Tokens(Given((3, 4), 1.0), "0", "0", prefix=1), _tokens_by_hand),
    WindowTokens: (
        lambda c, layer: WindowTokens(Given((3, 4)), WindowPath({"0": layer}, {}, {}, {}, None, None), 3, fresh=[0]),
        lambda c, p, x: c.layer(x),
    ),
    KeyValue: (lambda c, layer: KeyValue(Given((2, 3, 4)), "0", layer), lambda c, p, x: c.layer(x)),
    BatchStats: (lambda c, layer: BatchStats("0", layer, "adapt"), lambda c, p, x: c.layer(x)),
}


def _works(placement: type[Placement], kind: str) -> bool:
    """Where a placement must work; everywhere else it must be refused."""
    if placement is Tokens:  # single layers treat every token alone: prompts would change nothing
        return kind == "transformer encoder layer"
    if placement in (KeyValue, WindowTokens):
        return False
    if placement is BatchStats:
        return "batchnorm" in kind
    if placement is WeightDelta:
        return kind in CONVS or kind == "linear"
    if placement is Train:
        return kind != "transformer encoder layer"  # it has no parameters of its own
    return True


CELLS = [(p, k) for p in KINDS for k in LAYERS if not (p is Train and k == "transformer encoder layer")]
NAMES = [f"{p.__name__}-{k}" for p, k in CELLS]


def test_every_placement_of_the_library_is_in_the_matrix() -> None:
    assert set(KINDS) == set(PLACEMENTS.values())


@pytest.mark.parametrize(("placement", "kind"), CELLS, ids=NAMES)
def test_the_adapted_layer_is_right_or_refused_with_a_reason(placement: type[Placement], kind: str) -> None:
    case = Case(kind)
    model = nn.Sequential(copy.deepcopy(case.layer)).eval()
    make, formula = KINDS[placement]
    remembered = Remembered(model, case.inputs[0])
    if not _works(placement, kind):
        support = placement.supports(model[0])
        assert not support.forward
        assert support.reason
        return
    torch.manual_seed(2)
    adapter = attach(model, lambda a: make(case, a.module("0")), case.inputs[0])
    disturb(adapter)
    placed = adapter.placements[0][1]
    for x in case.inputs:
        with torch.no_grad():
            assert_close(run(model, x), formula(case, placed, x))
    if list(adapter.parameters()):
        assert_every_tensor_learns(adapter, case.inputs[0])
    tg.detach(model)
    remembered.assert_same()


@pytest.mark.parametrize(("placement", "kind"), CELLS, ids=NAMES)
def test_what_is_said_to_merge_reproduces_the_adapted_output(placement: type[Placement], kind: str) -> None:
    case = Case(kind)
    support = placement.supports(case.layer)
    if not support.merge:
        assert support.reason, "a placement that does not merge says why"
        return
    assert _works(placement, kind)
    model = nn.Sequential(copy.deepcopy(case.layer)).eval()
    adapter = disturb(attach(model, lambda a: KINDS[placement][0](case, a.module("0")), case.inputs[0]))
    folded = adapter.placements[0][1].folded(model[0])
    assert set(folded) <= set(case.layer._parameters)
    plain = _with_weights(case.layer, folded)
    for x in case.inputs:
        assert_close(run(plain, x), run(model, x))


MUST_MERGE = [(Affine, k) for k in (*CONVS, "linear", *NORMS)] + [(WeightDelta, k) for k in (*CONVS, "linear")]
MUST_MERGE += [(Train, k) for k in LAYERS]
MUST_MERGE = [
    (p, k)
    for p, k in MUST_MERGE
    if not (p is not Train and "standardised" in k) and not (p is Affine and "activation" in k)
]


@pytest.mark.parametrize(("placement", "kind"), MUST_MERGE, ids=[f"{p.__name__}-{k}" for p, k in MUST_MERGE])
def test_linear_changes_of_a_plain_weight_merge(placement: type[Placement], kind: str) -> None:
    assert placement.supports(build(kind)).merge


@pytest.mark.parametrize("kind", LAYERS)
def test_an_adapted_layer_supports_what_the_plain_one_does(kind: str) -> None:
    model, x = nn.Sequential(build(kind)).eval(), inputs(kind)[0]
    plain = {p: p.supports(model[0]) for p in PLACEMENTS.values()}
    attach(model, lambda _: Sequential(nn.Identity(), Point("0", "output")), x, name="first")
    assert {p: p.supports(model[0]) for p in PLACEMENTS.values()} == plain


# -- layers that are never called ------------------------------------------------------------------------


class AttentionHost(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x, need_weights=False)[0]


def _encoder() -> nn.Module:
    return nn.Sequential(nn.TransformerEncoderLayer(4, 2, 8, batch_first=True))


def _swin() -> nn.Module:
    return SwinTransformer([4, 4], 8, [2], [2], [2, 2], num_classes=3)


def _beit() -> nn.Module:
    return Beit(img_size=16, patch_size=8, embed_dim=8, depth=1, num_heads=2, num_classes=3)


IMAGE, SEQUENCE = (2, 3, 16, 16), (2, 5, 4)
NEVER_CALLED: dict[str, tuple[Callable[[], nn.Module], str, tuple[int, ...]]] = {
    "out_proj of nn.MultiheadAttention": (AttentionHost, "attention.out_proj", SEQUENCE),
    "out_proj of nn.TransformerEncoderLayer": (_encoder, "0.self_attn.out_proj", SEQUENCE),
    "qkv of torchvision's swin": (_swin, "features.1.0.attn.qkv", IMAGE),
    "proj of torchvision's swin": (_swin, "features.1.0.attn.proj", IMAGE),
    "qkv of timm's beit": (_beit, "blocks.0.attn.qkv", IMAGE),
}


def _host(case: str) -> tuple[nn.Module, str, Tensor]:
    make, path, shape = NEVER_CALLED[case]
    torch.manual_seed(0)
    model = make().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model, path, torch.randn(shape)


@pytest.mark.parametrize("case", NEVER_CALLED)
def test_a_weight_that_the_parent_reads_can_be_changed(case: str) -> None:
    model, path, x = _host(case)
    remembered = Remembered(model, x)
    layer = model.get_submodule(path)
    form = Given(layer.weight.shape)
    reference = copy.deepcopy(model)
    with torch.no_grad():
        reference.get_submodule(path).weight += form.value
    adapter = attach(model, lambda _: WeightDelta(path, form), x)
    assert_close(run(model, x), run(reference, x))
    assert not torch.equal(run(model, x), remembered.output)
    assert_every_tensor_learns(adapter, x)
    tg.detach(model)
    remembered.assert_same()


@pytest.mark.parametrize("case", NEVER_CALLED)
def test_its_parameters_can_be_trained(case: str) -> None:
    model, path, x = _host(case)
    remembered, reference = Remembered(model, x), copy.deepcopy(model)
    names = [n for n, p in model.get_submodule(path)._parameters.items() if p is not None]
    adapter = disturb(attach(model, lambda a: Train(path, {n: a.module(path)._parameters[n] for n in names}), x))
    for name, value in adapter.placements[0][1].owned().items():
        reference.get_submodule(path)._parameters[name] = value
    assert_close(run(model, x), run(reference, x))
    adapter.model.zero_grad()
    tg.detach(model)
    remembered.assert_same()


@pytest.mark.parametrize("placement", [Parallel, Sequential, Stream, Input, Affine, Replace, Tokens])
@pytest.mark.parametrize("case", NEVER_CALLED)
def test_what_acts_on_a_call_is_refused_there_and_says_that_there_is_none(
    case: str, placement: type[Placement]
) -> None:
    model, path, x = _host(case)
    remembered = Remembered(model, x)
    point, form = Point(path, "output"), nn.Identity()
    made: dict[type[Placement], Callable[[nn.Module], Placement]] = {
        Parallel: lambda m: Parallel(form, Point(path, "input"), point),
        Sequential: lambda m: Sequential(form, point),
        Stream: lambda m: Stream(form, Point(path, "input")),
        Input: lambda m: Input(form, path),
        Affine: lambda m: affine_for(m, path),
        Replace: lambda m: Replace(path, form),
        Tokens: lambda m: Tokens(Given((1, 4)), path, path),
    }
    with pytest.raises(tg.GraftError) as raised:
        attach(model, lambda a: made[placement](a.module(path)), x)
    message = str(raised.value)
    assert f"{path!r} is never called" in message
    assert f"exclude={path!r}" in message
    assert "\n" not in message
    remembered.assert_same()


# -- the inference path of nn.TransformerEncoderLayer, which bypasses its children -------------------------


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("path", ["linear1", "linear2", "norm1", "norm2", "self_attn"])
def test_the_fast_path_of_an_encoder_layer_does_not_bypass_adapters(path: str, padded: bool) -> None:
    class Root(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            layer = nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, batch_first=True)
            self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

        def forward(self, x: Tensor) -> Tensor:
            mask = torch.tensor([[False] * 5, [False] * 3 + [True] * 2]) if padded else None
            return self.encoder(x, src_key_padding_mask=mask)

    torch.manual_seed(0)
    model, x = Root().eval(), torch.randn(2, 5, 4)
    remembered = Remembered(model, x)
    home = f"encoder.layers.1.{path}"
    width = 8 if path == "linear1" else 4
    make = lambda _: Affine(home, nn.Parameter(torch.ones(width)), nn.Parameter(torch.zeros(width)), axis=-1)  # noqa: E731
    adapter = disturb(attach(model, make, x))
    slow = model(x).detach()  # with gradients nothing takes the fast path
    assert not torch.allclose(slow, remembered.output, atol=1e-3)
    assert_close(run(model, x), slow)
    assert_every_tensor_learns(adapter, x)
    tg.detach(model)
    remembered.assert_same()


def test_an_encoder_that_packs_padded_sequences_is_adapted_right_or_refused() -> None:
    """By default ``nn.TransformerEncoder`` hands nested tensors, which have no shape, to its layers."""

    class Root(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(4, 2, 8, batch_first=True), 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.encoder(x, src_key_padding_mask=torch.tensor([[False] * 5, [False] * 3 + [True] * 2]))

    torch.manual_seed(0)
    model, x, path = Root().eval(), torch.randn(2, 5, 4), "encoder.layers.1.linear2"
    remembered, form = Remembered(model, x), Given((4, 8))
    reference = copy.deepcopy(model)
    with torch.no_grad():
        reference.get_submodule(path).weight += form.value
    try:
        attach(model, lambda _: WeightDelta(path, form), x)
    except tg.GraftError:
        remembered.assert_same()
        return
    assert_close(run(model, x), run(reference, x))
