from __future__ import annotations

import pytest
import torch
from torch import nn

from torchgraft.errors import GraftError
from torchgraft.tasks.denseclip import ContextDecoder


def test_the_published_decoder_has_its_parameter_count() -> None:
    assert sum(p.numel() for p in ContextDecoder().parameters()) == 3_948_800


def test_linear_layers_start_small_and_without_biases() -> None:
    decoder = ContextDecoder(width=64, heads=4, layers=1, visual_dim=48)
    for module in decoder.modules():
        if isinstance(module, nn.Linear):
            assert 0.015 < float(module.weight.detach().std()) < 0.025
            assert module.bias is None or not module.bias.any()


def test_queries_of_another_width_come_back_in_it() -> None:
    decoder = ContextDecoder(width=16, heads=2, layers=1, visual_dim=24, query_dim=32)
    assert decoder(torch.randn(2, 5, 32), torch.randn(2, 7, 24)).shape == (2, 5, 32)


def test_the_order_of_the_visual_tokens_does_not_matter() -> None:
    decoder = ContextDecoder(width=16, heads=2, layers=2, visual_dim=24).eval()
    text, visual = torch.randn(2, 5, 24), torch.randn(2, 7, 24)
    torch.testing.assert_close(decoder(text, visual), decoder(text, visual.flip(1)))


def test_heads_that_do_not_divide_the_width_are_refused() -> None:
    with pytest.raises(GraftError, match="heads=3 does not divide the context decoder's width=16"):
        ContextDecoder(width=16, heads=3)
