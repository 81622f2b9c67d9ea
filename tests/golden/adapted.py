"""A frozen backbone with one of our adapters on it, seen through official names."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

from torch import Tensor, nn

import torchgraft as tg
from torchgraft.core.head import HEAD_SLOT
from torchgraft.core.placements import Placement
from torchgraft.official.assembly import BACKBONE, Assembly, OfficialError
from torchgraft.official.base import System, is_derived

from .case import GoldenCase, Merged, StateError, Tensors


class AdaptedNetwork(GoldenCase):
    """Image in, ``logits`` and ``features`` out; the loss is the mean square of the logits.

    Our names: ``backbone.KEY`` for a tensor of the backbone that acts, the adapter's own saved name for what
    the adapter owns, which includes its copies of trained norms and of BatchNorm statistics.

    Args:
        backbone: A plain network without a classifier.
        system: Where official keys live.
        num_classes: Outputs of the adapter's head.
        mode: ``train`` gives the official behaviour, in which every BatchNorm follows the batch.
        method: What is attached to it.
        counts: Which placements the reference counts as the adapter's; default: all but head, copies and statistics.
        blocks: Name of an output -> path of the module that returns it.
    """

    def __init__(
        self,
        backbone: nn.Module,
        system: System,
        *,
        num_classes: int | None,
        mode: str,
        method: tg.Method,
        counts: Callable[[Placement], bool] | None = None,
        blocks: Mapping[str, str] | None = None,
    ) -> None:
        self._system, self._blocks = system, dict(blocks or {})
        self._backbone = dict(backbone.state_dict(keep_vars=True))
        self._model = backbone.eval()
        policy = "train" if mode == "train" else "frozen"
        self._adapter = tg.attach(backbone, method, num_classes=num_classes, batchnorm=policy, lean=False)
        self._assembly = Assembly(system, self._adapter, self._backbone)
        counted = counts or (lambda p: p.kind not in ("train", "stats") and p.slot != HEAD_SLOT)
        adds = [placement for _, placement in self._adapter.placements if counted(placement)]
        ours = {id(t): name for name, t in self._assembly.tensors().items()}
        self._adds = {ours[id(t)] for p in adds for t in p.owned().values() if id(t) in ours}

    def name_of(self, key: str) -> str | None:
        try:
            found = self._assembly.names(key)
        except OfficialError as error:
            raise StateError(str(error)) from error
        return None if found is None else found[0]

    def is_dead(self, key: str) -> bool:
        return self._system.is_dead(key)

    def convert(self, tensors: Mapping[str, Tensor]) -> Tensors:
        try:
            return self._assembly.convert(tensors)
        except OfficialError as error:
            raise StateError(str(error)) from error

    def state(self) -> Tensors:
        return self._assembly.tensors()

    def parameters(self) -> dict[str, nn.Parameter]:
        return {n: t for n, t in self.state().items() if isinstance(t, nn.Parameter)}

    def adapter_parameters(self) -> set[str]:
        return self._adds

    def frozen(self) -> Tensors:
        return self._backbone

    def train(self, mode: bool) -> None:
        self._model.train(mode)

    def run(self, inputs: Tensors) -> Tensors:
        outputs: Tensors = {}
        head = self._adapter.head
        with watching(self._model, self._blocks, outputs), _features_of(head, outputs):
            outputs["logits"] = self._forward(inputs)
        return outputs

    def loss(self, outputs: Tensors) -> Tensor:
        return outputs["logits"].square().mean()

    def merged(self, inputs: Tensors) -> Merged:
        before = {k: t.detach().clone() for k, t in self._model.state_dict().items()}
        tg.merge(self._model, probe=next(iter(inputs.values())))
        after = {k: t.detach().clone() for k, t in self._model.state_dict().items() if "torchgraft" not in k.split(".")}
        outputs = self.run(inputs)
        tg.unmerge(self._model)
        deltas = {
            k.removesuffix(".weight"): t - before[k]
            for k, t in after.items()
            if k.endswith(".weight") and not t.equal(before[k])
        }
        owned = {n: t.detach() for n, t in self.state().items() if not n.startswith(f"{BACKBONE}.")}
        weights = {f"{BACKBONE}.{k}": t for k, t in after.items() if not is_derived(k)} | owned
        return Merged(deltas, weights, outputs)

    def _forward(self, inputs: Tensors) -> Tensor:
        return self._model(inputs["image"])


@contextmanager
def watching(model: nn.Module, blocks: Mapping[str, str], outputs: Tensors) -> Iterator[None]:
    """Keep what the named modules return."""

    def keep(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        return lambda module, args, out: outputs.update({name: out})

    handles = [model.get_submodule(path).register_forward_hook(keep(name)) for name, path in blocks.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _features_of(head: nn.Module | None, outputs: Tensors) -> Iterator[None]:
    """Keep what the head reads; it must run once."""
    if head is None:
        yield
        return
    seen: list[Tensor] = []
    handle = head.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    try:
        yield
    finally:
        handle.remove()
    assert len(seen) == 1, "the head must run once"
    outputs["features"] = seen[0].flatten(1)
