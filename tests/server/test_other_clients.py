"""Clients that know nothing of us: `curl`, and lm-eval's own `local-completions` (pip install 'lm-eval[api]')."""

from __future__ import annotations

import json
import shutil
import subprocess
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from serving import MODEL, Live

from specdec.attention.protocol import chunk_rows
from specdec.cache import KVCache
from specdec.generate import SpecDecoder
from specdec.sampling import Sampling

PAIRS = [("the cat", " sat"), ("abc abc", " abc"), ("x", "y z"), ("the cat", " ran off")]


def curl(*arguments: str) -> str:
    program = shutil.which("curl")
    if program is None:
        pytest.skip("curl is not installed")
    done = subprocess.run(
        [program, "-sS", "--noproxy", "*", *arguments], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_curl_asks_and_streams(live: Live, decoder: SpecDecoder) -> None:
    json_type = ("-H", "Content-Type: application/json")
    body = json.dumps({"prompt": "abcabc", "temperature": 0, "max_tokens": 12})
    url = f"{live.url}/v1/completions"
    offline = decoder.generate("abcabc", Sampling(max_tokens=12), chat=False, speculate=False)[0].text
    assert json.loads(curl(url, *json_type, "-d", body))["choices"][0]["text"] == offline
    streamed = curl("-N", url, *json_type, "-d", body[:-1] + ', "stream": true}')
    *events, done, rest = streamed.split("\n\n")
    assert (done, rest) == ("data: [DONE]", "")
    assert "".join(json.loads(e.removeprefix("data: "))["choices"][0]["text"] for e in events) == offline
    refused = curl("-w", "\n%{http_code}", url, *json_type, "-d", '{"prompt": "x", "n": 0}')
    told, status = refused.rsplit("\n", 1)
    assert (status, json.loads(told)["error"]["param"]) == ("400", "n")
    assert curl("-o", "/dev/null", "-w", "%{http_code}", f"{live.url}/health") == "200"


@pytest.fixture(scope="module")
def lm(live: Live, tmp_path_factory: pytest.TempPathFactory, decoder: SpecDecoder) -> Any:
    """lm-eval's client of the session's server, with the served tokenizer from a directory."""
    pytest.importorskip("lm_eval", reason="pip install 'lm-eval[api]'")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of its own dependencies
        from lm_eval.models.openai_completions import LocalCompletionsAPI
    directory: Path = tmp_path_factory.mktemp("tokenizer")
    decoder.tokenizer.save_pretrained(directory)
    return LocalCompletionsAPI(
        model=MODEL, base_url=f"{live.url}/v1/completions", tokenizer=str(directory), tokenizer_backend="huggingface",
        batch_size=3, max_length=200,
    )  # fmt: skip


def instances(kind: str, arguments: list[tuple[Any, ...]]) -> list[Any]:
    from lm_eval.api.instance import Instance

    return [Instance(kind, {}, one, number) for number, one in enumerate(arguments)]


@pytest.mark.filterwarnings("ignore")  # of lm-eval's dependencies
def test_lm_eval_loglikelihoods(lm: Any, decoder: SpecDecoder) -> None:
    target = decoder.engine.target
    for (context, ending), (score, greedy) in zip(
        PAIRS, lm.loglikelihood(instances("loglikelihood", PAIRS), disable_tqdm=True), strict=True
    ):
        start = len(decoder.encode(context, chat=False))
        ids = decoder.encode(context + ending, chat=False)
        zero = torch.tensor([0])
        states = target.forward(
            torch.tensor([ids]), chunk_rows(zero, zero, len(ids)), KVCache(target.info.cache, 1, 256), ()
        )
        table = target.logits(states.final)[0].log_softmax(-1)
        rows = range(start - 1, len(ids) - 1)
        assert score == pytest.approx(sum(float(table[i, ids[i + 1]]) for i in rows), abs=1e-3)
        assert greedy == all(int(table[i].argmax()) == ids[i + 1] for i in rows)


@pytest.mark.filterwarnings("ignore")
def test_lm_eval_rolling_and_generation(lm: Any, decoder: SpecDecoder) -> None:
    long = "the cat sat on the mat. " * 12  # longer than the client's window: it slides
    (total,) = lm.loglikelihood_rolling(instances("loglikelihood_rolling", [(long,)]), disable_tqdm=True)
    assert -1e5 < total < 0
    wish = {"until": ["\n\n"], "max_gen_toks": 10, "do_sample": False}
    (text,) = lm.generate_until(instances("generate_until", [("abcabc", wish)]), disable_tqdm=True)
    offline = decoder.generate("abcabc", Sampling(max_tokens=10), chat=False, speculate=False)[0].text
    assert text == offline
