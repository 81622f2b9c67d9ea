"""Settings that go with a method, as YAML files beside this one.

``NAME.yaml`` for a method's name holds what `torchgraft.tasks.configure` starts from; files named
``official-...`` hold what the authors' code uses.
"""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from ..errors import GraftError, nearest


def list_recipes() -> list[str]:
    """The names of the bundled recipes."""
    files = resources.files(__package__).iterdir()
    return sorted(f.name.removesuffix(".yaml") for f in files if f.name.endswith(".yaml"))


def load_recipe(name_or_path: str | Path) -> dict[str, Any]:
    """A recipe as a dictionary of settings.

    Args:
        name_or_path: Name of a bundled recipe, or path of a YAML file.

    Raises:
        GraftError: There is no such recipe or file, or it is not a YAML mapping.
    """
    name = str(name_or_path)
    if name in list_recipes():
        text = resources.files(__package__).joinpath(f"{name}.yaml").read_text(encoding="utf-8")
    else:
        path = Path(name).expanduser()
        if not path.is_file():
            hint = nearest(name, list_recipes())
            raise GraftError(f"recipe {name!r} is neither a bundled recipe nor a file; {hint}")
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise GraftError(f"recipe {name}: cannot be read ({error})") from error
    try:
        recipe = yaml.safe_load(text)
    except yaml.YAMLError as error:
        reason = " ".join(str(error).split())
        raise GraftError(f"recipe {name}: not valid YAML ({reason})") from None
    if recipe is None:
        return {}
    if not isinstance(recipe, dict) or not all(isinstance(key, str) for key in recipe):
        raise GraftError(f"recipe {name}: expected lines of the form 'key: value', such as 'lr: 0.005'")
    return recipe


def default_recipe(method_name: str) -> dict[str, Any]:
    """The recipe of a method; empty for a method without one (then `TrainConfig`'s defaults apply)."""
    return load_recipe(method_name) if method_name in list_recipes() else {}
