"""KronA (Edalati et al., "KronA: Parameter Efficient Tuning with Kronecker Adapter", arXiv 2212.10650).

A Kronecker product of two small matrices takes the place of LoRA's product of low rank: as few parameters, but a
change of high rank, rank(A kron B) = rank A rank B. A = ``a`` (a1, a2), B = ``b`` (b1, b2), s = ``scale``,
a1 b1 = d_in, a2 b2 = d_out, row-vector convention:

    krona          y  = x W + b + s x (A kron B)                       inside a weight
    krona-b        h' = MLP(n) + s n (A kron B)                        beside the MLP; n is what the MLP reads
    krona-b-res    h' = MLP(n) + s n (A kron B) + s_res n              s_res = ``residual_scale``, learned

A is Kaiming-uniform and B zero, so krona and krona-b start as the pretrained network. krona-b-res with the published
start s_res = 1 is not an identity; our default ``residual_init=0`` is. Published details that could not be checked
against the paper: the start of s_res, and that the B forms read the MLP's input behind the norm (``adapter_input``).

Parameters per matrix: a1 a2 + b1 b2, at least 2 sqrt(d_in d_out), which the default split reaches or comes near to.
ViT-B/16: krona on q and v 36,864; on q, k, v, o, fc1, fc2 147,456; krona-b 18,432; krona-b-res 18,444.
KronA is merged as W + s (A kron B)^T; the B forms stand beside a non-linear MLP and stay.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

from ..core.anatomy import Anatomy
from ..core.blocks import class_name
from ..core.branches import Branch
from ..core.method import Method, register
from ..core.placements import Parallel, Placement
from ..errors import GraftError
from .forms.kronecker import Kronecker, KroneckerBranch
from .forms.targets import Part, nothing_found, weights


@register("krona")
@dataclasses.dataclass(frozen=True)
class KronA(Method):
    """Config of KronA.

    Attributes:
        targets: Which weights: names of parts of a block (see :func:`torchgraft.methods.forms.targets.weights`);
            ``"auto"``: queries and values, on models without attention every weight of the blocks.
        a_shape: Shape (a1, a2) of A, for all weights; null: per weight, the split with the fewest parameters.
            Square factors reach a higher rank: [24, 24] on 768 x 768 gives full rank for 1,600 parameters.
        scale: s.
    """

    targets: Part | tuple[Part, ...] = "auto"
    a_shape: tuple[int, int] | None = None
    scale: float = 1.0

    def __post_init__(self) -> None:
        if isinstance(self.targets, list):
            object.__setattr__(self, "targets", tuple(self.targets))

    def placements(self, anatomy: Anatomy) -> list[Placement]:
        """One product per weight; on a k x k convolution B is a kernel."""
        found = weights(anatomy, self.targets, self.name)
        if not found:
            raise nothing_found(anatomy, self.targets, self.name)
        placed: list[Placement] = []
        for weight in found:
            try:
                form = Kronecker(weight.value(anatomy).shape, self.a_shape, self.scale)
            except GraftError as error:
                raise GraftError(f"{self.name}: at {weight.path!r} {error}") from None
            placed.append(weight.delta(anatomy, form))
        return placed


@register("krona-b")
@dataclasses.dataclass(frozen=True)
class KronAB(Method):
    """Config of KronA^B: a Kronecker branch beside every MLP.

    Attributes:
        a_shape: Shape (a1, a2) of A; null: per MLP, the split with the fewest parameters.
        scale: s.
        adapter_input: What the branch reads: ``"post_norm"``, as the MLP itself, or ``"pre_norm"``, the residual
            stream in front of the norm. The same in blocks that norm after the sum.
    """

    a_shape: tuple[int, int] | None = None
    scale: float = 1.0
    adapter_input: Literal["post_norm", "pre_norm"] = "post_norm"

    def placements(self, anatomy: Anatomy) -> list[Placement]:
        """One branch per MLP, added where the MLP is added to the residual stream."""
        branches = anatomy.branches("mlp")
        if not branches:
            raise GraftError(
                f"{self.name}: no block of {class_name(anatomy.model)} that is selected has an MLP to stand beside; "
                "use krona, which changes weights, or another selection"
            )
        return [self._beside(anatomy, branch) for branch in branches]

    def residual_start(self) -> float | None:
        """Where the factor of the residual starts; None: there is no residual."""
        return None

    def _beside(self, anatomy: Anatomy, branch: Branch) -> Placement:
        source = branch.reads if self.adapter_input == "post_norm" else branch.stream
        target = branch.adds
        layout, out_layout = anatomy.layout(source), anatomy.layout(target)
        if (layout.name == "NC...") != (out_layout.name == "NC..."):
            target = branch.returns
        axis = 1 if layout.name == "NC..." else -1
        width = anatomy.channels(source, layout)
        try:
            form = KroneckerBranch(width, self.a_shape, self.scale, residual=self.residual_start(), axis=axis)
        except GraftError as error:
            raise GraftError(f"{self.name}: beside the MLP of {branch.block!r} {error}") from None
        return Parallel(form, source, target)


@register("krona-b-res")
@dataclasses.dataclass(frozen=True)
class KronABRes(KronAB):
    """Config of KronA^B_res: KronA^B with a residual of its own.

    Attributes:
        a_shape: As for krona-b.
        scale: As for krona-b.
        adapter_input: As for krona-b.
        residual_init: Where s_res starts: 0 keeps the pretrained network, 1 is the published start.
    """

    residual_init: float = 0.0

    def residual_start(self) -> float | None:
        """The start of s_res."""
        return self.residual_init
