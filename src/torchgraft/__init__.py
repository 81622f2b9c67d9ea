"""torchgraft: adapt one frozen, pretrained vision backbone to many tasks by training a few per cent of it.

The public names below are loaded on first use, so that `torchgraft --help` does not wait for torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from .errors import GraftError
from .version import VERSION
from .when_imported import when_imported

if TYPE_CHECKING:
    from .bench.intrinsic import intrinsic_dimension
    from .core import (
        Adapter,
        Anatomy,
        Combination,
        MergeReport,
        Method,
        Plan,
        Site,
        activate,
        active,
        adapters,
        anatomy,
        attach,
        cast_frozen,
        detach,
        fingerprint,
        load,
        merge,
        method,
        methods,
        plan,
        prefers_channels_last,
        read_config,
        read_task,
        register,
        route,
        save,
        unmerge,
    )
    from .core.frames import VideoWrapper
    from .methods import (
        IA3,
        MAM,
        SSF,
        AdaptFormer,
        BitFit,
        Compacter,
        ConvAdapter,
        Convpass,
        ConvpassAttn,
        FacTTK,
        FacTTT,
        Full,
        Houlsby,
        KAdaptation,
        KronA,
        KronAB,
        KronABRes,
        Linear,
        LoHa,
        LoKr,
        LoRA,
        MultiheadAdapter,
        NormTuning,
        PadPrompt,
        ParallelAdapter,
        Partial,
        Pfeiffer,
        Prefix,
        ProTuning,
        RepNet,
        ScaledParallelAdapter,
        STAdapter,
        VPTAdd,
        VPTBelow,
        VPTDeep,
        VPTPad,
        VPTShallow,
    )
    from .official import load_official, official_systems

__version__ = VERSION

__all__ = [
    "IA3",
    "MAM",
    "SSF",
    "AdaptFormer",
    "Adapter",
    "Anatomy",
    "BitFit",
    "Combination",
    "Compacter",
    "ConvAdapter",
    "Convpass",
    "ConvpassAttn",
    "FacTTK",
    "FacTTT",
    "Full",
    "GraftError",
    "Houlsby",
    "KAdaptation",
    "KronA",
    "KronAB",
    "KronABRes",
    "Linear",
    "LoHa",
    "LoKr",
    "LoRA",
    "MergeReport",
    "Method",
    "MultiheadAdapter",
    "NormTuning",
    "PadPrompt",
    "ParallelAdapter",
    "Partial",
    "Pfeiffer",
    "Plan",
    "Prefix",
    "ProTuning",
    "RepNet",
    "STAdapter",
    "ScaledParallelAdapter",
    "Site",
    "VPTAdd",
    "VPTBelow",
    "VPTDeep",
    "VPTPad",
    "VPTShallow",
    "VideoWrapper",
    "__version__",
    "activate",
    "active",
    "adapters",
    "anatomy",
    "attach",
    "cast_frozen",
    "detach",
    "fingerprint",
    "intrinsic_dimension",
    "load",
    "load_official",
    "merge",
    "method",
    "methods",
    "official_systems",
    "plan",
    "prefers_channels_last",
    "read_config",
    "read_task",
    "register",
    "route",
    "save",
    "unmerge",
]


_HOMES = {
    "VideoWrapper": ".core.frames",
    "intrinsic_dimension": ".bench.intrinsic",
    "load_official": ".official",
    "official_systems": ".official",
}
"""Where public names live that neither a method nor the core defines."""


def __getattr__(name: str) -> Any:
    """Import the home of a public name when it is first asked for."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    package = importlib.import_module(".methods", __name__)
    if name == "methods":
        return package
    home = package if name in package.__all__ else importlib.import_module(_HOMES.get(name, ".core"), __name__)
    globals()[name] = getattr(home, name)
    return globals()[name]


def __dir__() -> list[str]:
    return sorted(__all__)


def _register_backbones() -> None:
    importlib.import_module(".backbones.timm_api", __name__).register_architectures()


when_imported("timm", _register_backbones)
