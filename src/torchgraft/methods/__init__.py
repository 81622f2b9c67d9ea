"""What is attached: one file per method. Importing this package registers them all."""

import sys
import types

from ..core.method import Method
from ..core.method import methods as _registered
from .bitfit import BitFit
from .conv_adapter import ConvAdapter
from .full import Full
from .linear import Linear
from .norm_tuning import NormTuning
from .pad_prompt import PadPrompt
from .partial import Partial
from .repnet import RepNet

__all__ = ["BitFit", "ConvAdapter", "Full", "Linear", "NormTuning", "PadPrompt", "Partial", "RepNet"]


class _CallableModule(types.ModuleType):
    """``torchgraft.methods`` is this package and, called, the registry: ``torchgraft.methods()``."""

    def __call__(self) -> dict[str, type[Method]]:
        return _registered()


sys.modules[__name__].__class__ = _CallableModule
