"""`specdec chat` and `specdec demo`: a bad turn costs that turn alone, Ctrl-C ends a demo, one token has no speed."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import engines
import pytest
import torch

from specdec.head.export import TargetNames, save_raw

FAST = ["--dtype", "float32", "--device", "cpu", "--draft", "ngram", "--tree", "3/4/12"]
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(specdec: Run, model: Path) -> Run:
    """`specdec VERB MODEL WORDS`."""
    return lambda verb, *words, stdin=b"": specdec(verb, model, *FAST, *words, stdin=stdin)


CHAT = ("chat", "--ignore-eos", "--max-length", "64")


def test_an_answer_takes_the_room_that_is_left(run: Run) -> None:
    code, _, err = run(*CHAT, stdin=b"hi\n")
    assert code == 0
    assert f"{64 - len('u:hi.a:')} tokens, " in err, "512 by default, which the context does not have"


def test_a_full_context_costs_the_turn_alone(run: Run) -> None:
    code, out, err = run(*CHAT, "--max-tokens", "4", stdin=b"hi\n" + b"x" * 70 + b"\nyo\n/reset\nhi\n")
    assert code == 0
    assert err.count("4 tokens, ") == 3
    assert "is longer than the context" in err and "/reset" in err.split("is longer")[1]
    first, _, *_, last = out.splitlines()
    assert first == last


def test_a_line_that_is_not_utf8_costs_that_line_alone(run: Run) -> None:
    code, _, err = run(*CHAT, "--max-tokens", "4", stdin=b"hi\n\xff\xfe\nmore")
    assert code == 0
    assert err.count("4 tokens, ") == 2
    assert err.count("is not UTF-8") == 1


def test_an_answer_that_fails_is_told_and_no_history(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    from specdec.generate import SpecDecoder
    from specdec.target.load import LeanTarget

    logits, sick, seen = LeanTarget.logits, iter([True]), []
    encode = SpecDecoder.encode

    def failing(self: LeanTarget, final: torch.Tensor) -> torch.Tensor:
        return logits(self, final) * (torch.nan if next(sick, False) else 1)

    def watched(self: SpecDecoder, prompt: Any, **more: Any) -> tuple[int, ...]:
        seen.append(prompt)
        return encode(self, prompt, **more)

    monkeypatch.setattr("specdec.target.load.self_test", lambda target: None)
    monkeypatch.setattr(LeanTarget, "logits", failing)
    monkeypatch.setattr(SpecDecoder, "encode", watched)
    code, _, err = run(*CHAT, "--max-tokens", "4", stdin=b"hi\nyo\n")
    assert code == 0
    assert "NaN" in err and err.count("4 tokens, ") == 1
    asked = [prompt for prompt in seen if isinstance(prompt, list)]
    assert asked[-1][0]["content"] == "yo", "the turn that failed is history"


def test_one_token_has_no_speed(run: Run) -> None:
    code, out, err = run("demo", "--max-tokens", "1")
    assert code == 0, err
    assert "NO" not in out


def test_a_demo_takes_the_taps_of_a_head_that_names_none(run: Run, model: Path, tmp_path: Path) -> None:
    head = engines.random_head(engines.load(model.parent, "llama", "lean"), range(20))
    path = save_raw(head, tmp_path / "head", target=TargetNames(str(model)))
    config = json.loads((path / "config.json").read_text())
    for key in ("eagle_aux_hidden_state_layer_ids", "eagle_config", "specdec"):
        config.pop(key, None)
    (path / "config.json").write_text(json.dumps(config))
    words = ("demo", "--max-tokens", "2", "--draft", str(path))
    assert "--taps" in run(*words)[2]
    assert run(*words, "--taps", ",".join(map(str, head.config.taps)))[0] == 0


def test_a_demo_that_is_kept_in_a_file_is_plain_text(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    code, out, _ = run("demo", "--max-tokens", "16")
    assert code == 0
    assert "\033" not in out and "green" not in out
    assert out.split("same loop")[1].count("…") == 3, "more is cut than the prompts"


@pytest.mark.parametrize("interrupted", [1, 2])
def test_a_demo_ends_where_it_is_interrupted(
    run: Run, monkeypatch: pytest.MonkeyPatch, interrupted: int
) -> None:
    from specdec.generate import SpecDecoder

    answer, asked = SpecDecoder.run, []

    def stopped(self: SpecDecoder, request: Any) -> Any:
        asked.append(request)
        for piece in answer(self, request):
            if len(asked) == interrupted:
                raise KeyboardInterrupt
            yield piece

    monkeypatch.setattr(SpecDecoder, "run", stopped)
    code, _, err = run("demo", "--max-tokens", "20")
    assert (code, len(asked)) == (130, interrupted)
    assert "bug" not in err


def test_a_line_can_be_edited_and_given_up() -> None:
    pytest.importorskip("readline")
    pty = pytest.importorskip("pty")
    master, slave = pty.openpty()
    script = (
        "from rich.console import Console; from specdec.cli.chat import _ask\n"
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "print('asked', repr(_ask(Console())))"
    )
    environment = {**os.environ, "TERM": "xterm"}
    with subprocess.Popen(
        [sys.executable, "-c", script], stdin=slave, stdout=slave, stderr=slave, env=environment
    ) as process:
        try:
            _read_until(master, b"> ")
            os.write(master, b"no")
            _read_until(master, b"no")
            process.send_signal(signal.SIGINT)
            _read_until(master, b"leaves")
            _read_until(master, b"> ")
            os.write(master, b"b\x1b[Da\n")  # to the left of b
            told = _read_until(master, b"asked")
            told += _read_until(master, b"\n")
        finally:
            process.kill()
    os.close(slave)
    os.close(master)
    assert b"asked 'ab'" in told


def _read_until(terminal: int, mark: bytes) -> bytes:
    read, end = b"", time.monotonic() + 30
    while mark not in read and time.monotonic() < end:
        if select.select([terminal], [], [], 0.1)[0]:
            read += os.read(terminal, 1)
    assert mark in read, read
    return read
