"""What a model is, to see that it comes back: objects, classes, attributes, modes, flags and bits."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn


class Snapshot:
    """A model's state at one moment, the bits of its tensors included."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.seen = self._look()
        self.bits = {name: _bits(t) for name, t in model.state_dict().items()}

    def assert_same(self) -> None:
        """The model is what it was then, object by object and bit by bit."""
        now = self._look()
        for what, then in self.seen.items():
            changed = [k for k in {**then, **now[what]} if then.get(k, _ABSENT) != now[what].get(k, _ABSENT)]
            assert not changed, f"{what} changed: {changed[:5]}"
        assert list(now["tensors"]) == list(self.seen["tensors"]), "the order of the keys changed"
        assert self.changed(self.bits) == []

    def assert_backbone_kept(self) -> None:
        """The backbone's tensors are under their keys, in their order and with their bits, whatever was added."""
        kept = _backbone(self.bits)
        assert _backbone(self.model.state_dict()) == kept
        assert self.changed(kept) == []

    def changed(self, keys: Iterable[str]) -> list[str]:
        """Which of these tensors have other bits now."""
        state = self.model.state_dict()
        return [key for key in keys if _bits(state[key]) != self.bits[key]]

    def _look(self) -> dict[str, dict[str, Any]]:
        modules = dict(self.model.named_modules())
        return {
            "objects": {path: id(m) for path, m in modules.items()},
            "classes": {path: type(m) for path, m in modules.items()},
            "attributes": {path: sorted(vars(m)) for path, m in modules.items()},
            "modes": {path: m.training for path, m in modules.items()},
            "requires_grad": {n: p.requires_grad for n, p in self.model.named_parameters()},
            "tensors": {n: id(t) for n, t in self.model.state_dict(keep_vars=True).items()},
        }


_ABSENT = object()


def _backbone(keys: Iterable[str]) -> list[str]:
    return [key for key in keys if "torchgraft" not in key.split(".")]


def _bits(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.dtype, tuple(tensor.shape), tensor.numpy(force=True).tobytes()
