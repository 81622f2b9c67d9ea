"""Adapters: attaching a method to a model, switching between several, and taking them off again."""

from __future__ import annotations

import dataclasses
import re
import warnings
from collections.abc import Iterable, Iterator
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..errors import GraftError, nearest
from ..lean.install import level_of
from ..swap import has_layer, swap, unswap
from .anatomy import Anatomy, Site
from .build import build, check, saved_prefix
from .frozen import (
    HeldInEval,
    count_once,
    freeze,
    hold_silent,
    own_parameters,
    reference_tensor,
    unfreeze,
)
from .graft import RESERVED, existing_point, graft_point, remove_point
from .head import HEAD_SLOT, KeepsHead
from .memory import NO_PARTS, Parts, parts_of, plain_again, settle_memory, stand_aside
from .method import Method
from .method import method as resolve
from .placements import BatchStats, Hook, Placement, Train
from .probe import Example, in_eval_mode


class Adapter:
    """A method attached to a backbone under a name, with its parameters, head and BatchNorm statistics.

    Made by :func:`attach` and :func:`torchgraft.load`. ``parameters()`` is what an optimiser needs.

    Attributes:
        name: Its name on the model.
        method: The method's config.
        model: The backbone it is attached to.
        num_classes: Outputs of its own head; None when it uses the backbone's classifier.
        batchnorm: BatchNorm policy.
        lean: Level of the lean layers while it is active, None for none; another one counts from the next
            :func:`activate` on, as for ``fold``.
        fold: Whether norms are computed in the weights before them while it is trained.
        sites: The sites it acts at.
        parked: Tensors of sites that this model lacks (a classifier's head on a feature extractor); they are
            saved again, so nothing is lost on the way.
    """

    def __init__(
        self,
        model: nn.Module,
        name: str,
        config: Method,
        *,
        num_classes: int | None,
        batchnorm: str,
        lean: str | None,
        fold: bool,
    ) -> None:
        self.model, self.name, self.method = model, name, config
        self.num_classes, self.batchnorm, self.lean, self.fold = num_classes, batchnorm, lean, fold
        self.placements: list[tuple[str, Placement]] = []
        self.sites: list[Site] = []
        self.include: list[str] | None = None
        self.exclude: list[str] | None = None
        self.parked: dict[str, Tensor] = {}
        self.dropout = False
        self.splits = True
        self.example: Example | None = None

    @property
    def head(self) -> nn.Module | None:
        """The adapter's own classifier, None when it has none."""
        return next((p.form for _, p in self.placements if p.slot == HEAD_SLOT), None)  # type: ignore[return-value]

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Trainable tensors by the name under which they are saved; shared ones once."""
        for name, tensor in self._owned():
            if isinstance(tensor, nn.Parameter):
                yield name, tensor

    def parameters(self) -> Iterator[nn.Parameter]:
        """What an optimiser needs: the trainable tensors, head included."""
        return (p for _, p in self.named_parameters())

    def num_parameters(self) -> int:
        """Number of trainable values the method adds, without the head."""
        return sum(p.numel() for n, p in self.named_parameters() if not _of_head(n))

    def head_parameters(self) -> int:
        """Number of trainable values in the adapter's own head."""
        return sum(p.numel() for n, p in self.named_parameters() if _of_head(n))

    def state_dict(self) -> dict[str, Tensor]:
        """Everything the adapter owns (parameters, statistics, head, parked tensors), detached, by name."""
        return {name: tensor.detach() for name, tensor in self._owned()} | self.parked

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Copy ``state`` into the adapter.

        Raises:
            GraftError: A tensor is missing, unknown, or has another shape, or the adapter is merged; the adapter
                is unchanged then.
        """
        registry = _registry(self.model)
        if registry is not None and registry.merged is not None and registry.merged.name == self.name:
            raise GraftError(f"adapter {self.name!r} is merged into the weights; unmerge first")
        own = dict(self._owned())
        missing = [n for n in (*own, *self.parked) if n not in state]
        unknown = [n for n in state if n not in own and n not in self.parked]
        if missing or unknown:
            which, verb = (missing[0], "lacks") if missing else (unknown[0], "has an unknown")
            count = len(missing) or len(unknown)
            raise GraftError(
                f"adapter {self.name!r}: the state {verb} tensor {which!r} ({count} in all); "
                "it belongs to another method, another selection of sites or another backbone"
            )
        for name, tensor in own.items():
            if tensor.shape != state[name].shape:
                raise GraftError(f"adapter {self.name!r}: {shape_mismatch(name, state[name], tensor)}")
        with torch.no_grad():
            for name, tensor in own.items():
                tensor.copy_(state[name])
        self.parked = {n: state[n].detach().clone() for n in self.parked}

    def save(
        self,
        folder: Any,
        dtype: torch.dtype | str | None = None,
        task: dict[str, Any] | None = None,
        format: Literal["torchgraft", "peft"] = "torchgraft",
    ) -> None:
        """Write the adapter to ``folder``; see :func:`torchgraft.save`."""
        from .checkpoint import save

        save(self, folder, dtype=dtype, task=task, format=format)

    def summary(self) -> str:
        """A few lines for people: method, sites, parameters."""
        total = own_parameters(self.model)
        own = self.num_parameters()
        lines = [
            f"{self.name}: {self.method} on {type(self.model).__name__.removeprefix('Grafted')}",
            f"  {len(self.sites)} sites, {own:,} trainable parameters ({100 * own / max(total, 1):.2f} % of {total:,})",
        ]
        if self.head is not None:
            lines.append(f"  head: {self.num_classes} classes, {self.head_parameters():,} parameters")
        lines.append(f"  BatchNorm: {self.batchnorm}")
        return "\n".join(lines)

    def __repr__(self) -> str:
        return f"<Adapter {self.summary()}>"

    def _owned(self) -> Iterator[tuple[str, Tensor]]:
        seen: set[int] = set()
        for prefix, placement in self.placements:
            for name, tensor in placement.owned().items():
                if id(tensor) not in seen:
                    seen.add(id(tensor))
                    yield f"{prefix}.{name}", tensor


@dataclasses.dataclass
class Registry:
    """What the root of an adapted model remembers."""

    adapters: dict[str, Adapter]
    active: str | None
    requires_grad: dict[str, bool]
    merged: Any = None
    dropout: bool | None = None
    parts: Parts | None = None
    settled: Any = None


def adapters(model: nn.Module) -> dict[str, Adapter]:
    """The adapters on ``model`` by name, in the order in which they were attached."""
    registry = _registry(model)
    return dict(registry.adapters) if registry else {}


def active(model: nn.Module) -> str | None:
    """The name of the adapter that acts, None when the model behaves like the plain backbone."""
    registry = _registry(model)
    return registry.active if registry else None


def attach(
    model: nn.Module,
    method: str | Method | Iterable[str | Method],
    *,
    name: str = "default",
    num_classes: int | None = None,
    include: str | Iterable[str] | None = None,
    exclude: str | Iterable[str] | None = None,
    batchnorm: str = "frozen",
    lean: bool | str = True,
    fold: bool = True,
    dropout: bool = False,
    example: Example | None = None,
    _headless: bool = False,
) -> Adapter:
    """Adapt ``model`` in place and return the adapter, which is active from then on.

    The backbone is frozen: its parameters get ``requires_grad=False``, its BatchNorms keep their statistics
    and its dropout stays off under ``model.train()``. Its state-dict keys, classes (up to a generated
    subclass) and attributes stay what they were.

    Args:
        model: Any module; timm, torchvision and transformers models are known by structure.
        method: ``"conv-adapter[reduction=4]"``, a config such as ``ConvAdapter(reduction=4)``, or a list.
        name: The adapter's name on this model.
        num_classes: Give the adapter its own head with this many outputs, in place of the classifier.
        include: Only these modules: a path (``layer1.0.conv1``), a glob, an address with slices
            (``stages[2:].blocks[-2:]``), or a list of them. A layer named exactly is adapted even where the
            method would not choose it.
        exclude: Not these modules; same forms.
        batchnorm: ``"frozen"``; ``"adapt"``: the adapter's own running statistics follow the task's
            batches; ``"train"``: batch statistics while training, as official training loops do.
        lean: What is kept for the backward: ``"exact"`` (True), ``"recompute"``, ``"checkpoint"``, ``"compact"`` or
            False; see :func:`torchgraft.lean.level_of`. All but ``compact`` give the same gradients, bit for bit.
        fold: Compute a frozen BatchNorm in the weight of the convolution before it, in forwards that will have a
            backward. Faster; moves outputs by rounding errors (about 1e-6).
        dropout: Let the backbone's own dropout and stochastic depth act in training.
        example: Input ``(args, kwargs)`` of the dry run, for models whose input cannot be guessed.

    Raises:
        GraftError: Unknown method, name in use, no site, a site that never runs, no classifier for
            ``num_classes``; the model is unchanged then.
    """
    config, level = resolve(method), level_of(lean)
    _check_name(model, name)
    was_active = active(model)
    if was_active is not None:
        activate(model, None)
    try:
        anatomy = Anatomy(model, example=example, include=include, exclude=exclude)
        if anatomy.trace is None:
            warnings.warn(
                f"{type(model).__name__} accepted no guessed input, so it is not known which sites run; "
                "give attach(..., example=(args, kwargs))",
                stacklevel=2,
            )
        adapter = Adapter(model, name, config, num_classes=num_classes, batchnorm=batchnorm, lean=level, fold=fold)
        adapter.example = example
        adapter.include, adapter.exclude = anatomy.selection.include, anatomy.selection.exclude or None
        placed = build(anatomy, config, num_classes=num_classes, batchnorm=batchnorm, headless=_headless)
        check(anatomy, config, placed)
        install(adapter, anatomy, placed, dropout=dropout)
    finally:
        if was_active is not None and active(model) is None:
            activate(model, was_active)
    try:
        _check_gradients(adapter, anatomy)
    except Exception:
        detach(model, name)
        activate(model, was_active)
        raise
    return adapter


def detach(model: nn.Module, name: str | None = None) -> None:
    """Take one adapter (or all) off; with the last one the model is what it was before, object and bits.

    Raises:
        GraftError: No adapter of this name.
    """
    registry = _registry(model)
    if registry is None:
        if name is not None:
            raise GraftError(f"the model has no adapter {name!r}; nothing is attached to it")
        return
    names = list(registry.adapters) if name is None else [_known(registry, name)]
    if registry.merged is not None:
        raise GraftError(f"adapter {registry.merged.name!r} is merged into the weights; unmerge first")
    for one in names:
        del registry.adapters[one]
    if registry.active in names:
        registry.active = next(reversed(registry.adapters), None)
    for module in list(model.modules()):
        point = existing_point(module)
        if point is None:
            continue
        for one in names:
            point.drop(one)
        if not point.actions and not point.adapters:
            remove_point(module)
            plain_again(module)
    if registry.adapters:
        activate(model, registry.active)
        return
    model.__dict__.pop("_torchgraft_registry", None)
    settle_memory(model, None, NO_PARTS, [], fold=False)
    unswap(model, KeepsHead)
    unfreeze(model, registry.requires_grad)


def activate(model: nn.Module, name: str | None) -> None:
    """Make ``name`` the adapter that acts; None switches to the plain backbone.

    Raises:
        GraftError: No adapter of this name.
    """
    registry = _registry(model)
    if registry is None:
        if name is None:
            return
        raise GraftError(f"the model has no adapter {name!r}; nothing is attached to it")
    if registry.merged is not None and name != registry.merged.name:
        raise GraftError(f"adapter {registry.merged.name!r} is merged into the weights; unmerge first")
    registry.active = None if name is None else _known(registry, name)
    wish = name is not None and registry.adapters[name].dropout
    if wish is not registry.dropout:
        hold_silent(model, wish)
        registry.dropout = wish
    if registry.active is not None:
        _settle(model, registry, registry.adapters[registry.active])
    for module in model.modules():
        point = existing_point(module)
        if point is not None:
            point.select(registry.active)
            stand_aside(module, point)
        if has_layer(module, HeldInEval):
            module.settle()  # type: ignore[operator]


def _settle(model: nn.Module, registry: Registry, adapter: Adapter) -> None:
    """The lean layers that ``adapter`` asks for, where others are in place."""
    apart = adapter.name if adapter.lean in ("recompute", "checkpoint") else None
    wish = (adapter.lean, adapter.fold, apart)
    if registry.settled != wish:
        placements = [p for _, p in adapter.placements]
        settle_memory(model, adapter.lean, registry.parts or NO_PARTS, placements, fold=adapter.fold)
        registry.settled = wish


def install(adapter: Adapter, anatomy: Anatomy, placed: list[Placement], *, dropout: bool = False) -> None:
    """Freeze the model, put the placements in, and make the adapter active."""
    model, name = adapter.model, adapter.name
    registry = _registry(model)
    if registry is None:
        registry = Registry({}, None, freeze(model), parts=parts_of(anatomy))
        model.__dict__["_torchgraft_registry"] = registry
        if callable(getattr(model, "reset_classifier", None)):
            swap(model, KeepsHead)
    adapter.dropout = dropout
    like = reference_tensor(model)
    for placement in placed:
        # Copies of what the backbone has keep their dtype; new forms take that of the backbone.
        placement.to(device=like.device, dtype=None if isinstance(placement, (Train, BatchStats)) else like.dtype)
        placement.train(model.training)
        count_once(placement)
        adapter.placements.append((saved_prefix(anatomy, placement), placement))
        insert(model, name, placement)
    adapter.splits = all(
        anatomy.calls(h.path) > 0 for _, p in adapter.placements for h in p.hooks() if h.when.startswith("view:")
    ) and all(p.splits for _, p in adapter.placements)
    homes = {p.home: None for _, p in adapter.placements if p.slot != HEAD_SLOT and p.kind != "stats"}
    adapter.sites = [anatomy.site(path) for path in homes]
    registry.adapters[name] = adapter
    registry.settled = None  # there are new places
    activate(model, name)


def insert(model: nn.Module, name: str, placement: Placement) -> None:
    """Register one placement at its home and its actions where they belong."""
    home = model.get_submodule(placement.home) if placement.home else model
    graft_point(home, placement.views()).add_placement(name, placement.slot, placement)
    for hook in placement.hooks():
        module = model.get_submodule(hook.path) if hook.path else model
        graft_point(module).add_action(name, hook.when, hook.action)
        _disarm_fast_path(model, hook)


def _disarm_fast_path(model: nn.Module, hook: Hook) -> None:
    """``nn.TransformerEncoderLayer`` bypasses its children in inference unless one of them has a hook."""
    point = existing_point(model.get_submodule(hook.path))
    if point is None or point._forward_pre_hooks:
        return
    parts = hook.path.split(".")
    above = (model.get_submodule(".".join(parts[:i])) for i in range(len(parts)))
    if any(isinstance(module, nn.TransformerEncoderLayer) for module in above):
        point.register_forward_pre_hook(_no_change)


def _no_change(module: nn.Module, args: Any) -> None:
    """A hook that does nothing; its presence is what counts."""


def _check_gradients(adapter: Adapter, anatomy: Anatomy) -> None:
    """Placements on weights of modules that are never called must still reach the output.

    One forward and one backward, only when there are such placements.
    """
    if anatomy.trace is None:
        return
    doubtful = [
        (p.home, [t for t in p.parameters() if t.requires_grad])
        for _, p in adapter.placements
        if p.functional and p.kind != "stats" and p.home and not anatomy.trace.fired(p.home)
    ]
    doubtful = [(home, tensors) for home, tensors in doubtful if tensors]
    if not doubtful:
        return
    args, kwargs = anatomy.trace.example
    with in_eval_mode(adapter.model), torch.enable_grad():
        out = adapter.model(*args, **kwargs)
        total = sum(t.float().sum() for t in _tensors_of(out) if t.requires_grad)
        if not isinstance(total, Tensor):
            grads: list[Tensor | None] = [None] * sum(len(t) for _, t in doubtful)
        else:
            grads = list(torch.autograd.grad(total, [t for _, ts in doubtful for t in ts], allow_unused=True))
    for home, tensors in doubtful:
        own, grads = grads[: len(tensors)], grads[len(tensors) :]
        if all(g is None for g in own):
            raise GraftError(
                f"{adapter.method.name}: the weights of site {home!r} do not reach the output, so nothing would be "
                f"trained there; exclude it with exclude={home!r}"
            )


def _tensors_of(out: Any) -> Iterator[Tensor]:
    if isinstance(out, Tensor):
        yield out
    elif isinstance(out, dict):
        for value in out.values():
            yield from _tensors_of(value)
    elif isinstance(out, (tuple, list)):
        for value in out:
            yield from _tensors_of(value)


def shape_mismatch(name: str, held: Tensor, needed: Tensor) -> str:
    """The error text for a saved tensor that does not fit."""
    classes = "; the number of classes differs" if _of_head(name) else ""
    return f"{name} has shape {tuple(held.shape)} in the state, the adapter needs {tuple(needed.shape)}{classes}"


def _of_head(name: str) -> bool:
    """Whether a saved name belongs to the adapter's own head (``head.weight``, not ``head.norm/...``)."""
    return name.startswith(f"{HEAD_SLOT}.") and "/" not in name


def registry_of(model: nn.Module) -> Registry:
    """The registry of a model that has adapters."""
    registry = _registry(model)
    assert registry is not None
    return registry


def _registry(model: nn.Module) -> Registry | None:
    return model.__dict__.get("_torchgraft_registry")


def _known(registry: Registry, name: str) -> str:
    if name not in registry.adapters:
        raise GraftError(f"the model has no adapter {name!r}; {nearest(name, registry.adapters)}")
    return name


def _check_name(model: nn.Module, name: str) -> None:
    if (
        not isinstance(name, str)
        or not re.fullmatch(r"[A-Za-z0-9_-]+", name)
        or name == RESERVED
        or hasattr(nn.ModuleDict(), name)
    ):
        raise GraftError(f"name={name!r}: expected letters, digits, '-' and '_' (and no name of a ModuleDict method)")
    if any("_torchgraft_registry" in m.__dict__ for m in model.modules() if m is not model):
        inner = next(p for p, m in model.named_modules() if p and "_torchgraft_registry" in m.__dict__)
        raise GraftError(
            f"the part {inner!r} of this model has adapters of its own; detach them, or attach to the part"
        )
    grafted = [p for p, m in model.named_modules() if existing_point(m) is not None]
    if grafted and _registry(model) is None:
        raise GraftError(
            f"{grafted[0] or 'the model'!r} belongs to a larger model that has adapters; "
            "attach to that one, or detach them first"
        )
    if name in adapters(model):
        raise GraftError(f"the model already has an adapter {name!r}; detach it first or give another name")
