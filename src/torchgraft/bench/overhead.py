"""What an attached site costs in Python, beside the same computation written by hand.

A chain of small blocks (8 channels, 4 x 4 pixels, so that Python dominates), each a 1x1 convolution with a branch
beside it. And LoRA of HF peft on a chain of linear layers, beside LoRA written by hand and ours on the same layers.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..core.adapter import attach
from ..errors import GraftError
from ..lean.meter import Timing, alternating
from ..methods import LoRA
from .goals import Goal
from .mechanisms import Block, HandBlock, freeze_but_branches, mechanisms

SITES, CHANNELS, RANK = 64, 8, 4
LIMIT = 1.5
"""Microseconds that a site may cost in the forward."""
BY_HAND, PLAIN = "by hand", "torchgraft, lean=False"


@dataclasses.dataclass(frozen=True)
class Row:
    """One mechanism.

    Attributes:
        what: ``branch`` beside a convolution, or ``lora`` on a linear layer.
        mechanism: Its name.
        forward: Microseconds per site of a forward without gradients, above the hand-written model.
        step: Microseconds per site of a forward and backward, above it.
        forward_ratio: Time of the forward relative to it.
        step_ratio: Time of forward and backward relative to it.
    """

    what: str
    mechanism: str
    forward: float
    step: float
    forward_ratio: float
    step_ratio: float


def measure(rounds: int = 41, *, peft: bool = True) -> list[Row]:
    """Time every mechanism; variants take turns within every round.

    Args:
        rounds: Rounds that are timed.
        peft: Also time LoRA of HF peft.

    Raises:
        GraftError: peft is not installed, or two variants compute different things.
    """
    rows = _rows("branch", *_branches(), rounds=rounds)
    if peft:
        rows += _rows("lora", *_loras(), rounds=rounds)
    return rows


def goals(rows: list[Row]) -> list[Goal]:
    """Attaching costs no more than ``LIMIT`` a site."""
    own = next(r for r in rows if r.what == "branch" and r.mechanism == "torchgraft")
    return [Goal("us a site in the forward, torchgraft", own.forward, LIMIT, advisory=True)]


def _rows(what: str, models: dict[str, nn.Module], x: Tensor, *, rounds: int) -> list[Row]:
    with torch.no_grad():
        wanted = models[BY_HAND](x)
        for name, model in models.items():
            if not torch.allclose(model(x), wanted, rtol=1e-4, atol=1e-5):
                raise GraftError(f"bench overhead: {name} computes something else than the model written by hand")
    forward = _timed({name: _forward(m, x) for name, m in models.items()}, rounds)
    step = _timed({name: _step(m, x) for name, m in models.items()}, rounds)
    # From the ratios within a round: the speed of the machine drifts by more than the difference between rounds.
    base = 1e6 * forward[BY_HAND].seconds / SITES, 1e6 * step[BY_HAND].seconds / SITES
    return [
        Row(
            what,
            name,
            base[0] * (forward[name].ratio - 1),
            base[1] * (step[name].ratio - 1),
            forward[name].ratio,
            step[name].ratio,
        )
        for name in models
    ]


def _timed(runs: dict[str, Callable[[], object]], rounds: int) -> dict[str, Timing]:
    return alternating(runs, rounds, warmup=2, repeat=3)


def _forward(model: nn.Module, x: Tensor) -> Callable[[], object]:
    def run() -> object:
        with torch.no_grad():
            return model(x)

    return run


def _step(model: nn.Module, x: Tensor) -> Callable[[], object]:
    def run() -> object:
        model.zero_grad()
        return model(x).sum().backward()

    return run


def _branches() -> tuple[dict[str, nn.Module], Tensor]:
    x = torch.randn(2, CHANNELS, 4, 4)
    hand = nn.Sequential(*[HandBlock(CHANNELS) for _ in range(SITES)]).eval()
    freeze_but_branches(hand)
    state = {name: t for name, t in hand.state_dict().items() if "branch" not in name}
    models: dict[str, nn.Module] = {BY_HAND: hand}
    for name, attach_by in {**mechanisms(), PLAIN: mechanisms(level=False)["torchgraft"]}.items():
        model = nn.Sequential(*[Block(CHANNELS) for _ in range(SITES)]).eval()
        model.load_state_dict(state)
        attach_by(model, x)
        models[name] = model
    return models, x


class _HandLoRA(nn.Module):
    """LoRA as one writes it, with alpha = rank: ``x W^T + b + x A^T B^T``."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base
        self.down, self.up = (nn.Parameter(torch.empty(s)) for s in ((RANK, CHANNELS), (CHANNELS, RANK)))

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + F.linear(F.linear(x, self.down), self.up)


def _loras() -> tuple[dict[str, nn.Module], Tensor]:
    x, down, up = torch.randn(2, CHANNELS), torch.randn(RANK, CHANNELS) / 4, torch.randn(CHANNELS, RANK) / 4
    layers = [nn.Linear(CHANNELS, CHANNELS).requires_grad_(False) for _ in range(SITES)]
    plain = nn.Sequential(*layers).eval()
    hand = nn.Sequential(*[_HandLoRA(copy.deepcopy(layer)) for layer in layers])
    models: dict[str, nn.Module] = {"torchgraft": copy.deepcopy(plain), PLAIN: copy.deepcopy(plain)}
    for name, model in models.items():
        paths = [path for path, _ in model.named_children()]
        config = LoRA(rank=RANK, alpha=RANK, targets="all")
        attach(model, config, include=paths, lean=name != PLAIN, example=((x,), {}))
    models = {BY_HAND: hand, **models, "HF peft": _peft_lora(plain)}
    with torch.no_grad():
        for name, parameter in (pair for model in models.values() for pair in model.named_parameters()):
            if parameter.requires_grad:
                parameter.copy_(down if "down" in name or "lora_A" in name else up)
    return models, x


def _peft_lora(model: nn.Module) -> nn.Module:
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError:
        raise GraftError(
            "bench overhead: HF peft is not installed; pip install 'torchgraft[dev]', or --no-peft"
        ) from None
    layers = [name for name, _ in model.named_children()]
    config = LoraConfig(r=RANK, lora_alpha=RANK, target_modules=layers)
    return inject_adapter_in_model(config, model)
