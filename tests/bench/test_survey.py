from __future__ import annotations

import pytest

from torchgraft.bench.survey import REFERENCE, survey


@pytest.fixture(scope="module")
def facts():
    """The facts of four methods of different kinds."""
    said = []
    found = {f.name: f for f in survey(["lora", "conv-adapter", "prefix", "ssf"], say=said.append)}
    assert said == list(found)
    return found


def test_sizes_are_those_that_were_published(facts) -> None:
    assert facts["lora"].parameters["vit_base"] == 294_912
    assert facts["ssf"].parameters["vit_base"] == 205_824
    assert facts["conv-adapter"].parameters["resnet50"] == 356_848
    assert set(facts["lora"].parameters) == set(REFERENCE)


def test_a_backbone_without_a_place_is_answered_with_the_reason(facts) -> None:
    assert "attention" in facts["prefix"].parameters["resnet50"]


def test_merging_is_yes_partly_or_no(facts) -> None:
    assert (facts["lora"].merge, facts["ssf"].merge, facts["conv-adapter"].merge) == ("yes", "partly", "no")


def test_papers_placements_and_layers_are_told(facts) -> None:
    assert facts["lora"].paper == "arXiv 2106.09685"
    assert facts["conv-adapter"].placements == ("parallel",)
    assert "linear" in facts["ssf"].layers and "batchnorm" in facts["ssf"].layers
