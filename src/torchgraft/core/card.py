"""The model card that is saved beside an adapter."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .adapter import Adapter


def model_card(adapter: Adapter, config: dict[str, Any], task: dict[str, Any] | None) -> str:
    """A README with what the adapter is, what it fits and how to use it."""
    backbone = config["backbone"]
    classes = (task or {}).get("classes") or []
    weights = backbone.get("weights") or backbone.get("tag") or "unknown"
    lines = [
        "---",
        "library_name: torchgraft",
        f"base_model: {backbone['architecture']}",
        f"tags: [torchgraft, adapter, {config['method']}]",
        "---",
        f"# {config['method']} adapter for {backbone['architecture']}",
        "",
        f"* method: `{adapter.method}`",
        f"* sites: {len(config['sites'])}; trainable parameters without the head: {config['parameters']:,}",
        f"* head: {config['num_classes']} classes" if config["num_classes"] else "* head: that of the backbone",
        f"* BatchNorm: {config['batchnorm']}",
        f"* backbone: `{backbone['architecture']}`, weights: {weights}",
    ]
    if classes:
        shown = ", ".join(str(c) for c in classes[:20]) + (" ..." if len(classes) > 20 else "")
        lines.append(f"* classes: {shown}")
    for key, value in ((task or {}).get("metrics") or {}).items():
        lines.append(f"* {key}: {value:.4f}" if isinstance(value, float) else f"* {key}: {value}")
    lines += [
        "",
        "```python",
        "import torchgraft as tg",
        "from torchgraft.backbones import create_backbone",
        "",
        f"model = create_backbone({backbone['architecture']!r})    # or any way you have to build it with its weights",
        'adapter = tg.load(model, "THIS_FOLDER")   # refuses a backbone with other weights',
        "```",
        "",
    ]
    return "\n".join(lines)
