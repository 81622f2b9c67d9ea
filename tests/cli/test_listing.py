from __future__ import annotations

import json

import pytest

import torchgraft as tg

from .conftest import BACKBONE, one_line_error


def test_methods_are_all_registered_ones_with_their_options(cli):
    rows = json.loads(cli("list", "methods", "--json").out)
    assert {row["name"] for row in rows} == set(tg.methods())
    options = next(row["options"] for row in rows if row["name"] == "conv-adapter")
    assert "reduction" in options


@pytest.mark.parametrize("kind", ["methods", "backbones", "assets", "samples", "recipes"])
def test_every_kind_has_names_in_the_table_and_in_json(cli, kind):
    rows = json.loads(cli("list", kind, "--json").out)
    table = cli("list", kind)
    assert rows and table.code == 0
    assert all(row["name"] in table.out for row in rows)


def test_a_filter_narrows_the_names(cli):
    names = [line.split()[0] for line in cli("list", "backbones", "convnext").out.splitlines()[1:]]
    assert BACKBONE in names and all("convnext" in name for name in names)


def test_no_match_is_said_on_the_error_stream(cli):
    spoken = cli("list", "samples", "xyzzy")
    assert (spoken.code, spoken.out) == (0, "") and "xyzzy" in spoken.err


def test_sites_have_addresses_roles_and_geometry_without_any_weights(cli):
    rows = json.loads(cli("list", "sites", BACKBONE, "--json").out)
    conv = next(row for row in rows if row["role"] == "spatial_conv")
    assert conv["address"].startswith("stages[0].blocks[0]")
    assert conv["kernel"] == [7, 7] and conv["in_channels"] == conv["out_channels"] > 0
    assert f"{conv['in_channels']} -> {conv['out_channels']}" in cli("list", "sites", BACKBONE).out


def test_sites_need_the_name_of_a_model(cli):
    assert "list sites resnet50" in one_line_error(cli("list", "sites"))


def test_an_unknown_kind_is_refused_with_the_valid_ones(cli):
    spoken = cli("list", "method")
    assert spoken.code == 2 and "methods" in spoken.err and "Traceback" not in spoken.err


def test_our_backbones_are_listed_with_what_was_published_about_them(cli):
    rows = json.loads(cli("list", "backbones", "hornet_tiny", "--json").out)
    row = next(r for r in rows if r["name"] == "hornet_tiny_7x7")
    assert (row["parameters"], row["top1"], row["strides"]) == (22_409_512, 82.8, [4, 8, 16, 32])
    assert "22,409,512" in cli("list", "backbones", "hornet_tiny").out


def test_few_models_of_timm_are_counted(cli):
    row = json.loads(cli("list", "backbones", "resnet18*", "--json").out)[0]
    assert (row["name"], row["parameters"], row["channels"]) == ("resnet18", 11_689_512, [64, 128, 256, 512])
    assert abs(row["gmacs"] - 1.82) < 0.02
