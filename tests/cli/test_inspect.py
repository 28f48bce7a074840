"""`specdec inspect`: says when no head ships, what to mind with one, and ends quietly when nobody reads on."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path

import engines
import pytest

from specdec.cli.screen import Screen
from specdec.head.export import TargetNames, save_raw

Inspect = Callable[..., tuple[int, str, str]]


@pytest.fixture
def inspect(specdec: Inspect, model: Path) -> Inspect:
    return lambda *words: specdec("inspect", model, "--dtype", "float32", "--device", "cpu", *words)


def test_a_target_without_a_head_is_told_so(inspect: Inspect, model: Path) -> None:
    for draft in ("head", "auto", "head+ngram"):
        code, out, err = inspect("--draft", draft)
        assert code == 0 and "LlamaForCausalLM" in out
        assert f"no head ships for {model}" in err
    assert "no head ships" not in inspect("--draft", "none")[2]


def test_words_mean_what_they_mean_to_generate(inspect: Inspect) -> None:
    assert inspect("--draft", "")[0] == inspect("--draft", "ngram")[0] == 0
    for draft in ("auto+ngram", "ngram+ngram", "none+ngram"):
        code, _, err = inspect("--draft", draft)
        assert code == 2 and "no such head directory" in err


def test_a_head_has_what_to_mind(inspect: Inspect, model: Path, tmp_path: Path) -> None:
    head = engines.random_head(engines.load(model.parent, "llama", "lean"), range(20))
    save_raw(head, tmp_path / "head", target=TargetNames(str(model)))
    code, out, _ = inspect("--draft", tmp_path / "head", "--json")
    told = json.loads(out)["head"]
    assert (code, told["match"]) == (0, "yes")
    assert told["engines"]["vLLM (V1 runner)"] == 'yes (mind: pass "method": "eagle3")'
    assert told["engines"]["speculators"].startswith("no: ")


def test_a_reader_that_has_gone_is_an_error_like_any_other() -> None:
    class Gone(io.StringIO):
        def write(self, text: str) -> int:
            raise BrokenPipeError

    with pytest.raises(BrokenPipeError):
        Screen(file=Gone()).print("a table")
