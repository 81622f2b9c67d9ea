"""A frozen backbone with one of our adapters on it, seen through official names."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

import torchgraft as tg
from torchgraft.core.placements import BatchStats, Train

from .case import GoldenCase, StateError, Tensors
from .names import Home, Names, is_ignorable


class AdaptedNetwork(GoldenCase):
    """Image in, ``logits`` and ``features`` out; the loss is the mean square of the logits.

    Our names: ``backbone.KEY`` for a tensor of the backbone that acts, the adapter's own saved name for what
    the adapter owns, which includes its copies of trained norms and of BatchNorm statistics.

    Args:
        backbone: A plain network without a classifier.
        method: What is attached to it.
        num_classes: Outputs of the adapter's head.
        mode: ``train`` gives the official behaviour, in which every BatchNorm follows the batch.
        names: Where official keys live.
        is_adapter: Whether an attached form is one that the official code calls a tuning module.
    """

    def __init__(
        self,
        backbone: nn.Module,
        method: tg.Method,
        *,
        num_classes: int,
        mode: str,
        names: Names,
        is_adapter: Callable[[nn.Module], bool],
    ) -> None:
        self._names = names
        self._backbone = dict(backbone.state_dict(keep_vars=True))
        self._model = backbone.eval()
        policy = "train" if mode == "train" else "frozen"
        adapter = tg.attach(backbone, method, num_classes=num_classes, batchnorm=policy, lean=False)
        assert adapter.head is not None
        self._head = adapter.head
        self._owned: Tensors = {}  # our name -> tensor
        self._copies: dict[str, str] = {}  # key of a backbone tensor -> our name of the adapter's copy
        self._adapters: dict[str, str] = {}  # prefix of our names -> path of the module it acts at
        self._norms: list[str] = []  # prefixes of extra norms
        for prefix, placement in adapter.placements:
            owned = {f"{prefix}.{name}": (name, tensor) for name, tensor in placement.owned().items()}
            self._owned |= {name: tensor for name, (_, tensor) in owned.items()}
            if isinstance(placement, (Train, BatchStats)):
                self._copies |= {_join(placement.home, inner): name for name, (inner, _) in owned.items()}
            elif is_adapter(placement.form):
                self._adapters[prefix] = placement.home
            elif placement.slot == "norm":
                self._norms.append(prefix)

    def name_of(self, key: str) -> str | None:
        if is_ignorable(key) or self.is_dead(key):
            return None
        home = self._names.home(key)
        find = {
            "backbone": self._in_backbone,
            "adapter": self._in_adapter,
            "norm": self._in_extra_norm,
            "head": self._in_head,
        }
        return find[home.owner](key, home)

    def is_dead(self, key: str) -> bool:
        return self._names.is_dead(key)

    def state(self) -> Tensors:
        backbone = {f"backbone.{k}": t for k, t in self._backbone.items() if k not in self._copies}
        return {name: t for name, t in (backbone | self._owned).items() if not is_ignorable(name)}

    def parameters(self) -> dict[str, nn.Parameter]:
        return {n: t for n, t in self.state().items() if isinstance(t, nn.Parameter)}

    def adapter_parameters(self) -> set[str]:
        return {name for name in self._owned if name.startswith(tuple(f"{p}." for p in self._adapters))}

    def frozen(self) -> Tensors:
        return self._backbone

    def train(self, mode: bool) -> None:
        self._model.train(mode)

    def run(self, inputs: Tensors) -> Tensors:
        features: list[Tensor] = []
        handle = self._head.register_forward_pre_hook(lambda _, args: features.append(args[0]))
        try:
            logits = self._model(inputs["image"])
        finally:
            handle.remove()
        assert len(features) == 1, "the head must run once"
        return {"logits": logits, "features": features[0].flatten(1)}

    def loss(self, outputs: Tensors) -> Tensor:
        return outputs["logits"].square().mean()

    # -- the home of a key ------------------------------------------------------------------------------

    def _in_backbone(self, key: str, home: Home) -> str:
        path = _join(home.path, home.name)
        if path not in self._backbone:
            raise StateError(f"official key {key!r} has no place: the backbone has no {path!r}")
        return self._copies.get(path, f"backbone.{path}")

    def _in_adapter(self, key: str, home: Home) -> str:
        inside = [p for p, path in self._adapters.items() if f"{path}.".startswith(f"{home.path}.")]
        return self._only(key, f"adapters at {home.path!r}", inside, home)

    def _in_extra_norm(self, key: str, home: Home) -> str:
        return self._only(key, "extra norms", self._norms, home)

    def _in_head(self, key: str, home: Home) -> str:
        return f"head.{home.name}"

    def _only(self, key: str, what: str, prefixes: list[str], home: Home) -> str:
        if len(prefixes) != 1:
            raise StateError(f"official key {key!r} has {len(prefixes)} places: {what} are {prefixes}")
        return f"{prefixes[0]}.{home.name}"


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name
