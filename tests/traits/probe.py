"""``python tests/traits/probe.py METHOD``: what every family of the property tests says to a method."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import torch

import torchgraft as tg
from tests.properties.families import CLASSES, FAMILIES, network, run


def main() -> None:
    for spec in sys.argv[1:]:
        for family, kind in FAMILIES.items():
            print(f"{spec:20} {family:26} {_said(spec, family, kind)}", flush=True)


def _said(spec: str, family: str, kind: object) -> str:
    model = network(family)
    before = run(model, FAMILIES[family].batch())
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            adapter = tg.attach(model, spec, num_classes=CLASSES if FAMILIES[family].classifier else None)
    except tg.GraftError as error:
        return f"REFUSED  {error}"
    tg.detach(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            adapter = tg.attach(model, spec)
        except tg.GraftError:
            return "accepted with a head only"
    same = torch.allclose(run(model, FAMILIES[family].batch()), before, rtol=1e-4, atol=1e-5)
    return f"accepted, {adapter.num_parameters()} parameters, {'identity' if same else 'MOVED START'}"


if __name__ == "__main__":
    main()
