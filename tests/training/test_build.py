"""The head's numbers: from the recipe, else from the target, whatever its family calls them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_head import HIDDEN
from tiny_training import TableTarget

from specdec.layers.rope import frequencies
from training.build import head_config
from training.recipe import parse_recipe

NAMED: dict[str, Any] = {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 48}


def test_a_family_with_names_of_its_own_lends_its_sizes() -> None:
    """GPT-2 says n_head and no MLP width at all; its rows in the cache tell the size of a head."""
    config = head_config(TableTarget(), {"n_head": 16, "n_embd": HIDDEN}, parse_recipe(""), 25)
    assert (config.heads, config.kv_heads, config.head_dim) == (16, 16, 2)
    assert config.intermediate == 4 * HIDDEN


@pytest.mark.parametrize("kind", ["yarn", "dynamic", "longrope"])
def test_positions_scaled_in_a_way_that_heads_do_not_know_are_not_scaled(kind: str) -> None:
    rope = {"rope_type": kind, "rope_theta": 5000.0, "factor": 4.0}
    config = head_config(TableTarget(), NAMED | {"rope_parameters": rope}, parse_recipe(""), 25)
    assert (config.theta, config.scaling) == (5000.0, None)
    known = head_config(
        TableTarget(), NAMED | {"rope_parameters": rope | {"rope_type": "linear"}}, parse_recipe(""), 25
    )
    assert torch.equal(frequencies(8, known.theta, known.scaling), frequencies(8, 5000.0) / 4)
