"""What the benchmarks measure: one backbone with random weights under every method, level and peer.

Weights are random but not blank: BatchNorms get statistics and an affine map that folding must get right, LayerScale
starts at 0.2 to 0.6 where it would start near zero, and whatever a method starts at zero gets small random values. A
branch that is wrong, or missing, therefore shows in every output and gradient. The same seed gives the same tensors
under every level.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from ..backbones import create_backbone
from ..core.adapter import Adapter, adapters, attach
from ..core.ghosts import fake_on_cpu, without_data
from ..core.layers import is_batchnorm
from ..core.method import Method
from ..core.method import method as resolve
from ..errors import GraftError, nearest
from ..methods import LoRA
from .hf_peft import peft_lora

CLASSES = 10
PEERS = ("full", "linear", "peft-lora")
"""Full fine-tuning, a trained classifier on the frozen backbone, and LoRA by HF peft on the layers of ours."""

LEVELS: dict[str, dict[str, Any]] = {
    "plain": {"lean": False, "fold": False},
    "folded": {"lean": False, "fold": True},
    "exact": {"lean": "exact", "fold": True},
    "recompute": {"lean": "recompute", "fold": True},
    "checkpoint": {"lean": "checkpoint", "fold": True},
    "compact": {"lean": "compact", "fold": True},
}
"""Name of a level and how it is attached; ``plain`` is a method as it is usually coded."""

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}

_LORA_LAYERS = {
    "resnet": r"layer\d+\.\d+\.conv2",
    "efficientnet": r"blocks\..*\.conv_pwl?",
    "convnext": r"stages\..*\.mlp\.fc[12]",
    "vision_transformer": r"blocks\..*\.(qkv|proj|fc1|fc2)",
}
"""Module of timm and the layers that get LoRA in models of that family, as a pattern of their whole path."""


@dataclasses.dataclass(frozen=True)
class Setting:
    """One benchmark's backbone and input.

    Attributes:
        model: Name of a timm model.
        batch: Images in a batch.
        image_size: Side of the images in pixels.
        dtype: ``fp32`` or ``bf16``, for weights and images.
        device: ``cpu`` or ``cuda``.
        channels_last: Memory order of images and kernels.
        seed: Start of all random values.
    """

    model: str
    batch: int = 8
    image_size: int = 224
    dtype: str = "fp32"
    device: str = "cpu"
    channels_last: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise GraftError(f"dtype={self.dtype!r}; {nearest(self.dtype, DTYPES)}")
        if torch.device(self.device).type == "cuda" and not torch.cuda.is_available():
            raise GraftError(f"device={self.device!r}: this torch sees no CUDA device; use cpu")

    def to_dict(self) -> dict[str, Any]:
        """The setting as plain data."""
        return dataclasses.asdict(self)


@dataclasses.dataclass
class Subject:
    """One variant of the backbone, ready to run.

    Attributes:
        method: The method or peer, in its string form.
        level: Name of the level; empty for peers.
        model: The model, in the mode in which it is trained.
        adapter: What is attached to it; None for peers.
        image: Input (N, 3, H, W).
        target: Classes (N,).
    """

    method: str
    level: str
    model: nn.Module
    adapter: Adapter | None
    image: Tensor
    target: Tensor

    @property
    def label(self) -> str:
        """Method and level as one name."""
        return f"{self.method} {self.level}".strip()

    def loss(self) -> Tensor:
        """The loss of one batch."""
        return F.cross_entropy(self.model(self.image), self.target)

    def trained(self) -> dict[str, nn.Parameter]:
        """The tensors that are trained, by name."""
        named = self.adapter.named_parameters() if self.adapter else self.model.named_parameters()
        return {name: p for name, p in named if p.requires_grad}

    def held(self) -> list[Tensor]:
        """What is in memory anyway: parameters, buffers and the batch."""
        return [*self.model.parameters(), *self.model.buffers(), self.image, self.target]

    def ghost(self, mode: FakeTensorMode) -> Subject:
        """The same without data, to count its bytes in a moment; it runs within ``mode``."""
        make = fake_on_cpu(mode)
        model, (inputs, _) = without_data(self.model, ((self.image, self.target), {}), make)
        adapter = adapters(model)[self.adapter.name] if self.adapter else None
        return dataclasses.replace(self, model=model, adapter=adapter, image=inputs[0], target=inputs[1])

    def gradients(self) -> dict[str, Tensor]:
        """The gradients of one batch by name of the tensor; none is left behind.

        Raises:
            GraftError: A tensor that is trained gets none.
        """
        self.loss().backward()
        found = {}
        for name, tensor in self.trained().items():
            if tensor.grad is None:
                raise GraftError(f"{self.label}: {name!r} gets no gradient; this is a mistake in the method")
            found[name], tensor.grad = tensor.grad, None
        return found


def subject(setting: Setting, method: str | Method, level: str = "plain") -> Subject:
    """The backbone under a method at a level, or as a peer.

    Args:
        setting: Backbone and input.
        method: A method with options, or one of ``PEERS``. LoRA with ``targets=auto`` stands on the layers of
            :func:`lora_layers`, its peer in HF peft too.
        level: One of ``LEVELS``; peers have none.

    Raises:
        GraftError: Unknown method, level or backbone, a method that does not fit it, or peft is not installed.
    """
    if level not in LEVELS:
        raise GraftError(f"level {level!r}; {nearest(level, LEVELS)}")
    with torch.random.fork_rng():
        torch.manual_seed(setting.seed)
        model = backbone(setting)
        image = torch.randn(setting.batch, 3, setting.image_size, setting.image_size)
        target = torch.randint(0, CLASSES, (setting.batch,))
        adapter: Adapter | None = None
        if isinstance(method, str) and method in PEERS:
            level = ""
            model = _peer(model, method)
        else:
            adapter = attach_at(model, method, level)
    image = image.to(setting.device, DTYPES[setting.dtype], memory_format=_memory_format(setting))
    return Subject(str(method), level, model, adapter, image, target.to(setting.device))


def attach_at(model: nn.Module, method: str | Method, level: str = "plain", *, name: str = "default") -> Adapter:
    """Attach a method at a level, with a head and with small random values for whatever starts at zero.

    Args:
        model: The backbone.
        method: A method with options; LoRA with ``targets=auto`` stands on the layers of :func:`lora_layers`.
        level: One of ``LEVELS``.
        name: Name of the adapter.
    """
    config, include = resolve(method), None
    if isinstance(config, LoRA) and config.targets == "auto":
        config, include = dataclasses.replace(config, targets="all"), lora_layers(model)
    adapter = attach(model, config, name=name, num_classes=CLASSES, include=include, **LEVELS[level])
    with torch.no_grad():
        for parameter in adapter.parameters():
            if not parameter.any():
                parameter.normal_(0, 0.02)
    return adapter


def backbone(setting: Setting) -> nn.Module:
    """The backbone in eval mode, with random values from torch's generator that leave no part of it blank."""
    model = create_backbone(setting.model, pretrained=False, image_size=setting.image_size, num_classes=CLASSES)
    with torch.no_grad():
        for module in model.modules():
            if is_batchnorm(module):
                _unblank(module)
            gamma = getattr(module, "gamma", None)
            if isinstance(gamma, nn.Parameter):
                gamma.uniform_(0.2, 0.6)
    model = model.to(setting.device, DTYPES[setting.dtype])
    return model.to(memory_format=_memory_format(setting)).eval()


def default_methods(model: nn.Module) -> tuple[str, ...]:
    """The methods that one compares on this backbone."""
    prompts = any(name.endswith("attn.qkv") for name, _ in model.named_modules())
    return ("vpt-deep[num_tokens=10]" if prompts else "conv-adapter[reduction=4]", "ssf", "lora")


def lora_layers(model: nn.Module) -> list[str]:
    """Paths of the layers that get LoRA.

    ResNet: the 3x3 convolution of every bottleneck (the second of every basic block). EfficientNet: the 1x1
    convolutions of the blocks. ConvNeXt: fc1 and fc2. Vision transformers: qkv, proj, fc1 and fc2.

    Raises:
        GraftError: Another family.
    """
    family = type(model).__module__.rpartition(".")[2]
    if family not in _LORA_LAYERS:
        raise GraftError(
            f"{type(model).__name__}: it is not written down which layers get LoRA; name the methods to measure, "
            f"without lora, or use a model of timm's {', '.join(_LORA_LAYERS)}"
        )
    pattern = re.compile(_LORA_LAYERS[family])
    return [path for path, module in model.named_modules() if pattern.fullmatch(path)]


def as_list(text: str | None, default: Iterable[str]) -> list[str]:
    """Names separated by commas outside of brackets: ``"ssf,lora[rank=4,alpha=4]"``."""
    if text is None:
        return list(default)
    return [part.strip() for part in re.split(r",(?![^\[]*\])", text) if part.strip()]


def _peer(model: nn.Module, name: str) -> nn.Module:
    if name == "full":
        return model.train()
    if name == "peft-lora":
        return peft_lora(model, lora_layers(model), LoRA())
    model.requires_grad_(False)
    model.get_classifier().requires_grad_(True)  # type: ignore[operator]
    return model


def _unblank(norm: nn.Module) -> None:
    """Statistics and an affine map as training leaves them."""
    norm.running_mean.normal_(0, 0.1)  # type: ignore[operator, union-attr]
    norm.running_var.uniform_(0.5, 1.5)  # type: ignore[operator, union-attr]
    if norm.weight is not None:
        norm.weight.uniform_(0.5, 1.2)  # type: ignore[operator]
        norm.bias.normal_(0, 0.1)  # type: ignore[operator, union-attr]


def _memory_format(setting: Setting) -> torch.memory_format:
    return torch.channels_last if setting.channels_last else torch.contiguous_format
