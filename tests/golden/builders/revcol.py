"""Builders of the system ``revcol``: small networks of columns, with and without intermediate supervision."""

from __future__ import annotations

from torch import Tensor

from torchgraft.backbones.revcol import RevCol, official_name
from torchgraft.backbones.revcol_supervision import CompoundLoss, Supervised, compound_loss
from torchgraft.errors import GraftError

from ..backbone_case import BackboneCase
from ..case import Config, GoldenCase, Tensors
from ..files import CaseError

_ALPHA = ".alpha"


def revcol(config: Config, mode: str) -> GoldenCase:
    return RevColCase(config, top_link=False)


def revcol_huge(config: Config, mode: str) -> GoldenCase:
    return RevColCase(config, top_link=True)


FORMS = {"revcol": revcol, "revcol_huge": revcol_huge}


class RevColCase(BackboneCase):
    """``logits`` and the maps of the last column; with supervision all logits, images and the compound loss.

    The official forward clamps its alphas in place, ours the values it uses: these are its state once it has run.
    """

    def __init__(self, config: Config, *, top_link: bool, memory: str = "recompute") -> None:
        try:
            model = RevCol(
                num_classes=config["num_classes"],
                dims=tuple(config["channels"]),
                depths=tuple(config["layers"]),
                columns=config["num_subnet"],
                kernel_size=config["kernel_size"],
                top_link=top_link,
                memory=memory,
                inter_supv=config["inter_supv"],
                zero_alpha=config["zero_alpha"],
                drop_path_rate=config["drop_path_rate"],
            )
        except GraftError as error:
            raise CaseError(str(error)) from error
        last = f"columns.{config['num_subnet'] - 1}.levels"
        self._supervised, self._loss = config["inter_supv"], config["compound_loss"]
        if self._loss is not None and not (self._supervised and set(self._loss) == {"f_coe", "c_coe"}):
            raise CaseError(f"compound_loss is {self._loss}: expected f_coe and c_coe, and inter_supv")
        maps = {} if self._supervised else {f"c{i}": f"{last}.{i}" for i in range(4)}
        super().__init__(model, official_name, maps)
        self._ran = False

    def state(self) -> Tensors:
        found = super().state()
        if not self._ran:
            return found
        levels = {k: self.model.get_submodule(k.removesuffix(_ALPHA)) for k in found if k.endswith(_ALPHA)}
        return found | {k: level.used_alpha() for k, level in levels.items()}

    def forward(self, inputs: Tensors) -> Tensors:
        self._ran = True
        if not self._supervised:
            return super().forward(inputs)
        found: Supervised = self.model.forward_supervised(inputs["image"])
        outputs = {f"cls{i}": t for i, t in enumerate(found.logits)}
        outputs |= {f"img{i}": t for i, t in enumerate(found.images)}
        if self._loss is not None:
            loss: CompoundLoss = compound_loss(found, inputs["image01"], inputs["soft_targets"], **self._loss)
            outputs |= {"compound_loss": loss.loss.reshape(1), "compound_parts": loss.parts}
        return outputs

    def loss(self, outputs: Tensors) -> Tensor:
        read = [t for name, t in outputs.items() if name.startswith(("logits", "cls", "img"))]
        return sum(t.square().mean() for t in read)
