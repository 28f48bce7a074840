"""The head's numbers and labels: from the recipe, else from the target, whatever its family calls and does to them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import tiny
import torch
from tiny_head import HIDDEN
from tiny_training import TableTarget
from transformers import AutoModelForCausalLM, PhiConfig, PreTrainedModel

from specdec.layers.rope import frequencies
from specdec.target.adapter import adapt
from training.build import Vocabulary, build, choose_vocabulary, head_config, weighed
from training.data import Sample
from training.features import Capture, Features
from training.losses import target_probs
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


def _phi() -> PreTrainedModel:
    sizes = {name: size for name, size in tiny.COMMON.items() if name != "head_dim"}
    model: PreTrainedModel = AutoModelForCausalLM.from_config(PhiConfig(**sizes))
    torch.nn.init.normal_(model.lm_head.bias)
    return model


@pytest.mark.parametrize("arch", ["granite", "gemma2", "phi"])
def test_labels_are_what_the_target_would_say(arch: str) -> None:
    """Granite divides its logits, Gemma 2 caps them, Phi's LM head has a bias: over any draft vocabulary the head is
    taught the target's own law."""
    target = adapt(_phi() if arch == "phi" else tiny.build(arch), arch)
    texts = [Sample("a", np.arange(3, 35, dtype=np.int32), np.arange(32) > 4)]
    recipe = parse_recipe("", ["head.taps=[2, 4, 6]", "trainer.precision=fp32", "vocab.size=40"])
    vocabulary = choose_vocabulary(texts, target, recipe)
    features = Features(texts, Capture(target, (2, 4, 6)))
    config = head_config(target, NAMED, recipe, 40)
    objective, _ = build(target, config, vocabulary, features, recipe)
    final = features.take([0])[0].final
    told = target_probs(final, objective.rows, objective.finish)
    torch.testing.assert_close(
        told, target.logits(final)[:, vocabulary.ids].softmax(-1), rtol=1e-4, atol=1e-6
    )


def test_what_lies_outside_the_draft_vocabulary_is_weighed_where_answers_stand() -> None:
    target = TableTarget()
    texts = [Sample(str(n), np.arange(1, 15, dtype=np.int32), np.arange(14) > n) for n in (3, 9)]
    ids = torch.tensor([0, 2, 3, 7])
    told = weighed(Vocabulary(ids, 0.5), Features(texts, Capture(target, (2,)))).outside
    law = target.logits(target.final[torch.from_numpy(np.r_[4:14, 10:14])]).softmax(-1)
    inside = torch.zeros(law.shape[-1], dtype=torch.bool)
    inside[ids] = True
    assert told is not None and told.positions == 14
    assert told.mass == pytest.approx(float(law[:, ~inside].sum(-1).mean()), rel=1e-5)
    assert told.argmax == pytest.approx(float((~inside[law.argmax(-1)]).float().mean()))


def test_nothing_lies_outside_a_full_vocabulary_and_nothing_is_weighed_without_answers() -> None:
    target = TableTarget()
    texts = [Sample("a", np.arange(1, 9, dtype=np.int32), np.zeros(8, dtype=bool))]
    features = Features(texts, Capture(target, (2,)))
    for ids in (torch.arange(target.info.vocab), torch.tensor([0, 2])):
        assert weighed(Vocabulary(ids, 1.0), features).outside is None
