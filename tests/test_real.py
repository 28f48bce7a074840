"""Once on the real default model: in float32, speculation gives the tokens of plain decoding."""

from __future__ import annotations

import engines
import pytest
import torch

from specdec import Options, Sampling, SpecDecoder
from specdec.drafting.protocol import Shape

PROMPTS = ["Repeat: one two three one two three", "Why is the sky blue?"]
OPTIONS = Options(dtype=torch.float32, device="cpu", slots=2, max_length=128, tree=Shape(4, 4, 16))


@pytest.mark.real
def test_speculation_on_the_default_model_equals_plain_decoding() -> None:
    plain = SpecDecoder.from_pretrained("smollm2-135m", None, OPTIONS)
    settings = Sampling(max_tokens=24)
    wanted = plain.generate(PROMPTS, settings)
    assert "blue" in wanted[1].text
    assert [a.token_ids for a in plain.with_drafter("ngram", OPTIONS).generate(PROMPTS, settings)] == [
        a.token_ids for a in wanted
    ]
    target = plain.engine.target
    ids = {token for answer in wanted for token in answer.token_ids} | set(range(100, 140))
    limits = engines.Limits(2, 128)
    drafter = engines.eagle(target, engines.random_head(target, ids), limits)
    requests = [engines.request(str(i), plain.encode(p), settings) for i, p in enumerate(PROMPTS)]
    for request in requests:
        request.stop_ids = frozenset(target.info.stop_ids)
    machine = engines.engine(target, drafter, Shape(4, 4, 16), limits)
    engines.run(machine, requests)
    assert [tuple(r.output) for r in requests] == [a.token_ids for a in wanted]
    assert machine.counters.drafted > 0
