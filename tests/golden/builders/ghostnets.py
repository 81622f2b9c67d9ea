"""Builders of the system ``ghostnets``: timm's GhostNet and our G-GhostNet."""

from __future__ import annotations

from timm.models.ghostnet import GhostBottleneck, GhostModule, GhostNet
from torch import nn

from torchgraft.backbones.ghost_regnet import GGhostRegNet, GhostStage, official_name
from torchgraft.errors import GraftError

from ..backbone_case import BackboneCase
from ..case import Config, GoldenCase
from ..files import CaseError

_COLUMNS = ("kernel", "expansion", "out", "se_ratio", "stride")
"""What the numbers of a row mean to timm, in its order."""
_C_GHOST = {"num_classes", "width", "cfgs", "cfg_columns", "ratio", "dw_size", "drop_rate"}
_G_GHOST = {"num_classes", "stem_width", "depths", "widths", "group_width", "cheap_ratio", "drop_rate"}


def c_ghost(config: Config, mode: str) -> GoldenCase:
    """Image in; every group of blocks and the logits out."""
    _check(config, _C_GHOST)
    columns = config["cfg_columns"]
    if sorted(columns) != sorted(_COLUMNS):
        raise CaseError(f"ghostnets: the columns of cfgs are {columns}, expected {list(_COLUMNS)} in any order")
    groups = [[[row[columns.index(name)] for name in _COLUMNS] for row in group] for group in config["cfgs"]]
    model = GhostNet(groups, num_classes=config["num_classes"], width=config["width"], drop_rate=0.0)
    for block in model.modules():
        if isinstance(block, GhostBottleneck):
            block.ghost1 = _ghost(block.ghost1, config, nn.ReLU)
            block.ghost2 = _ghost(block.ghost2, config, nn.Identity)
    return BackboneCase(model, lambda key: key, {f"block{i}": f"blocks.{i}" for i in range(len(model.blocks))})


def g_ghost(config: Config, mode: str) -> GoldenCase:
    """Image in; the stages, the mix of every ghost stage and the logits out."""
    _check(config, _G_GHOST)
    try:
        model = GGhostRegNet(**{name: config[name] for name in _G_GHOST - {"drop_rate"}}, drop_rate=0.0)
    except GraftError as error:
        raise CaseError(str(error)) from error
    stages = {f"stage{i}": f"layer{i + 1}" for i in range(4)}
    ghosts = [i for i in range(4) if isinstance(model.get_submodule(f"layer{i + 1}"), GhostStage)]
    mixes = {f"merge{i}": f"layer{i + 1}.merge" for i in ghosts}
    return BackboneCase(model, official_name, stages | mixes, optional=mixes)


FORMS = {"c_ghost": c_ghost, "g_ghost": g_ghost}


def _ghost(module: GhostModule, config: Config, act: type[nn.Module]) -> GhostModule:
    """The same module with the ratio and the cheap kernel of the case, which timm's network does not pass on."""
    convolution: nn.Conv2d = module.primary_conv[0]  # type: ignore[assignment]
    size = {"ratio": config["ratio"], "dw_size": config["dw_size"]}
    return GhostModule(convolution.in_channels, module.out_chs, act_layer=act, **size)


def _check(config: Config, known: set[str]) -> None:
    """Dropout acts in no case, whatever its rate; everything else must be used."""
    if unknown := sorted(config.keys() - known - {"form"}):
        raise CaseError(f"ghostnets: the config holds {', '.join(unknown)}, which means nothing to us")
    if not 0 <= config["drop_rate"] < 1:
        raise CaseError(f"ghostnets: drop_rate is {config['drop_rate']!r}, expected a number from 0 to below 1")
