"""What is attached: one file per method. Importing this package registers them all."""

import sys
import types

from ..core.method import Method
from ..core.method import methods as _registered
from .adaptformer import AdaptFormer
from .bitfit import BitFit
from .compacter import Compacter
from .conv_adapter import ConvAdapter
from .convpass import Convpass, ConvpassAttn
from .fact import FacTTK, FacTTT
from .full import Full
from .houlsby import Houlsby
from .ia3 import IA3
from .kadaptation import KAdaptation
from .krona import KronA, KronAB, KronABRes
from .linear import Linear
from .loha import LoHa
from .lokr import LoKr
from .lora import LoRA
from .mam import MAM
from .multihead_adapter import MultiheadAdapter
from .norm_tuning import NormTuning
from .pad_prompt import PadPrompt
from .parallel_adapter import ParallelAdapter, ScaledParallelAdapter
from .partial import Partial
from .pfeiffer import Pfeiffer
from .prefix import Prefix
from .pro_tuning import ProTuning
from .repnet import RepNet
from .ssf import SSF
from .st_adapter import STAdapter
from .vpt import VPTDeep, VPTShallow
from .vpt_add import VPTAdd
from .vpt_image import VPTBelow, VPTPad

__all__ = [
    "IA3",
    "MAM",
    "SSF",
    "AdaptFormer",
    "BitFit",
    "Compacter",
    "ConvAdapter",
    "Convpass",
    "ConvpassAttn",
    "FacTTK",
    "FacTTT",
    "Full",
    "Houlsby",
    "KAdaptation",
    "KronA",
    "KronAB",
    "KronABRes",
    "Linear",
    "LoHa",
    "LoKr",
    "LoRA",
    "MultiheadAdapter",
    "NormTuning",
    "PadPrompt",
    "ParallelAdapter",
    "Partial",
    "Pfeiffer",
    "Prefix",
    "ProTuning",
    "RepNet",
    "STAdapter",
    "ScaledParallelAdapter",
    "VPTAdd",
    "VPTBelow",
    "VPTDeep",
    "VPTPad",
    "VPTShallow",
]


class _CallableModule(types.ModuleType):
    """``torchgraft.methods`` is this package and, called, the registry: ``torchgraft.methods()``."""

    def __call__(self) -> dict[str, type[Method]]:
        return _registered()


sys.modules[__name__].__class__ = _CallableModule
