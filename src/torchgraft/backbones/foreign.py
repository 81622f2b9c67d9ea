"""Backbones that are not timm's: torchvision models and local folders of transformers models.

Both get a ``pretrained_cfg`` with the fields that timm's models have (architecture, input size, mean,
standard deviation), so that everything downstream reads one place.
"""

from __future__ import annotations

import importlib.util
import json
import warnings
from pathlib import Path
from typing import Any

import torchvision.models
from torch import nn
from torchvision.models.vision_transformer import interpolate_embeddings

from ..errors import GraftError, nearest
from .assets import file_digest
from .network import failure_reason, network_patience
from .provenance import note_origin
from .weights_file import classifier_names, fit_weights


def torchvision_names() -> list[str]:
    """Every classification model of torchvision, as ``torchvision:NAME``."""
    return [f"torchvision:{name}" for name in torchvision.models.list_models(module=torchvision.models)]


def load_torchvision_model(
    name: str,
    *,
    pretrained: bool,
    image_size: int | None,
    num_classes: int | None,
    local_ways: str,
    **kwargs: Any,
) -> nn.Module:
    """Build ``torchvision.models.NAME``.

    Args:
        name: The name without the prefix.
        pretrained: Load torchvision's default weights.
        image_size: Side of the input; a vision transformer is built for it.
        num_classes: Size of the classifier; 0 removes it, None keeps the pretrained one.
        local_ways: End of the error message when the download fails.
        **kwargs: For the model's constructor.

    Raises:
        GraftError: The name does not exist or the weights cannot be downloaded.
    """
    names = [n.removeprefix("torchvision:") for n in torchvision_names()]
    if name not in names:
        raise GraftError(f"torchvision has no classification model {name!r}; {nearest(name, names)}")
    weights = torchvision.models.get_model_weights(name)
    chosen = weights["DEFAULT"] if "DEFAULT" in weights.__members__ else None
    if num_classes:
        kwargs["num_classes"] = num_classes
    if image_size is not None and name.startswith("vit_"):
        kwargs["image_size"] = image_size
    with warnings.catch_warnings():
        # Some constructors warn that their initialisation is slow; the weights replace it.
        warnings.simplefilter("ignore", FutureWarning)
        model = torchvision.models.get_model(name, weights=None, **kwargs)
    note_origin(model, "random", **_torchvision_config(name, chosen, model))
    if num_classes == 0:
        for head in classifier_names(model):
            model.set_submodule(head, nn.Identity())
    if pretrained:
        if chosen is None:
            raise GraftError(
                f"torchvision has no weights for {name}; give a file with --weights FILE (weights=) or "
                "start from random weights with --no-pretrained (pretrained=False)"
            )
        try:
            with network_patience():
                state = dict(chosen.get_state_dict(progress=True, check_hash=True))
        except Exception as error:
            raise GraftError(
                f"torchvision:{name}: cannot download the pretrained weights ({failure_reason(error)}); {local_ways}"
            ) from error
        if "image_size" in kwargs:
            patch = model.patch_size
            state = dict(interpolate_embeddings(image_size, patch, state))  # type: ignore[arg-type]
        model.load_state_dict(fit_weights(state, model, str(chosen)))
    return note_origin(model, f"torchvision:{chosen}") if pretrained else model


def load_transformers(
    name: str, folder: Path, *, pretrained: bool = True, num_classes: int | None = None, **kwargs: Any
) -> nn.Module:
    """Build a transformers model from a local folder with ``config.json`` and its weights.

    Args:
        name: What the caller asked for, for messages.
        folder: The folder.
        pretrained: Load the folder's weights; otherwise only its configuration is used.
        num_classes: Give the model an image classifier of this size; None keeps the architecture that the
            folder was saved with if it classifies images, and loads the plain encoder otherwise.
        **kwargs: Overrides of the configuration.

    Raises:
        GraftError: The folder has no model, or the package ``transformers`` is missing.
    """
    if importlib.util.find_spec("transformers") is None:
        raise GraftError(
            f"{name} needs the package transformers, which is not installed; run: pip install 'transformers>=5'"
        )
    if not (folder / "config.json").is_file():
        raise GraftError(
            f"{name}: {folder} is no folder with a config.json; hf: takes a local folder as save_pretrained "
            "writes it (config.json and model.safetensors)"
        )
    from transformers import AutoConfig, AutoModel, AutoModelForImageClassification

    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
        for key, value in kwargs.items():
            setattr(config, key, value)
        saved_as = (config.architectures or [""])[0]
        factory: Any = AutoModel
        if num_classes or (num_classes is None and saved_as.endswith("ForImageClassification")):
            factory = AutoModelForImageClassification
            if num_classes:
                config.num_labels = num_classes
        if not pretrained:
            return note_origin(factory.from_config(config), "random", **_transformers_config(folder, config))
        model, info = factory.from_pretrained(
            folder,
            config=config,
            local_files_only=True,
            output_loading_info=True,
            ignore_mismatched_sizes=bool(num_classes),
        )
    except (OSError, ValueError, KeyError) as error:
        raise GraftError(f"{name}: cannot load a model from {folder}: {failure_reason(error)[:200]}") from error
    lost = sorted(k for k in info["missing_keys"] if not k.startswith(("classifier", "pooler")))
    if lost:
        raise GraftError(f"{name}: {folder} lacks weights of the model: {', '.join(lost[:3])}")
    weights = folder / "model.safetensors"
    origin = f"file:sha256:{file_digest(weights)}" if weights.is_file() else "file"
    return note_origin(model, origin, **_transformers_config(folder, config))


def _torchvision_config(name: str, weights: Any, model: nn.Module) -> dict[str, Any]:
    layers = [n for n, m in model.named_modules() if isinstance(m, nn.Linear)]
    if not layers:
        layers = [n for n, m in model.named_modules() if isinstance(m, nn.Conv2d)]
    # Auxiliary classifiers (GoogLeNet, Inception) have the classifier's size and go with it.
    auxiliary = [n for n in layers if n.lower().startswith("aux") and n.endswith(("fc", "fc2"))]
    config: dict[str, Any] = {
        "architecture": f"torchvision:{name}",
        "classifier": (*auxiliary, layers[-1]),
        "interpolation": "bilinear",
    }
    crop = 224
    if weights is not None:
        preset = weights.transforms()
        crop = preset.crop_size[0]
        config |= {
            "interpolation": preset.interpolation.value,
            "mean": tuple(preset.mean),
            "std": tuple(preset.std),
            "crop_pct": crop / preset.resize_size[0],
        }
    return config | {"input_size": (3, crop, crop)}


def _transformers_config(folder: Path, config: Any) -> dict[str, Any]:
    found: dict[str, Any] = {"architecture": f"hf:{config.model_type}", "classifier": "classifier"}
    size = getattr(config, "image_size", None)
    if size is not None:
        height, width = (size, size) if isinstance(size, int) else tuple(size)
        found["input_size"] = (3, height, width)
    processor = folder / "preprocessor_config.json"
    if processor.is_file():
        values = json.loads(processor.read_text(encoding="utf-8"))
        for ours, theirs in (("mean", "image_mean"), ("std", "image_std")):
            if values.get(theirs):
                found[ours] = tuple(values[theirs])
    return found
