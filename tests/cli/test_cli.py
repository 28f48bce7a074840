"""The command line: bad input ends with code 2 and one clear line, Ctrl-C keeps what came, JSON has its fields."""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import engines
import pytest
import torch
from safetensors.torch import load_file, save_file

from specdec.cli.prompts import read_stdin
from specdec.head.export import TargetNames, save_raw

FAST = ["--dtype", "float32", "--device", "cpu", "--tree", "3/4/12", "--ignore-eos", "--max-tokens", "8"]
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(specdec: Run, model: Path) -> Run:
    """`specdec generate TARGET WORDS`."""
    return lambda *words, target=model, stdin=b"": specdec("generate", target, *FAST, *words, stdin=stdin)


def _refused(answer: tuple[int, str, str], *told: str) -> None:
    code, out, err = answer
    assert code == 2, err
    assert out == ""
    assert "Traceback" not in err
    for part in told:
        assert part in err
    assert sum("specdec generate:" in line for line in err.splitlines()) == 1


def test_an_unknown_target(run: Run, tmp_path: Path) -> None:
    _refused(
        run("-p", "x", target="no-such-model"), "target: no such target", "no-such-model", "smollm2-135m"
    )
    _refused(run("-p", "x", target=tmp_path), "config.json")
    _refused(run("-p", "x", target="nobody/nothing"), "nobody/nothing")


def test_a_row_that_cannot_be_asked_keeps_no_other_from_its_answer(run: Run, tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    rows = [
        {"id": "short", "prompt": "a b"},
        {"id": "long", "turns": ["word " * 5000, "more"]},
        {"id": "last", "prompt": "c"},
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    code, out, err = run("--prompts", str(file), "--json")
    answers = [json.loads(line) for line in out.splitlines()]
    assert code == 2
    assert [a["id"] for a in answers] == ["short", "long", "last"]
    assert [a["finish_reason"] for a in answers] == ["length", "error", "length"]
    assert answers[1]["stats"] is None
    assert "long: prompt" in err and "Traceback" not in err


def test_an_unknown_head(run: Run, tmp_path: Path) -> None:
    _refused(run("-p", "x", "--draft", str(tmp_path / "nowhere")), "nowhere")
    (tmp_path / "empty").mkdir()
    _refused(run("-p", "x", "--draft", str(tmp_path / "empty")), "config.json")


def test_a_head_of_another_target(run: Run, model: Path, tmp_path: Path) -> None:
    other = engines.load(tmp_path, "qwen3", "lean")
    head = save_raw(
        engines.random_head(other, range(20)), tmp_path / "head", target=TargetNames("tiny/qwen3")
    )
    _refused(run("-p", "x", "--draft", str(head)), "fingerprint", "trained on another target")


def _copy(model: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(model, tmp_path / "copy"))


def test_truncated_weights(run: Run, model: Path, tmp_path: Path) -> None:
    copy = _copy(model, tmp_path)
    file = copy / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    _refused(run("-p", "x", target=copy), "model.safetensors")


def test_weights_that_are_not_numbers(run: Run, model: Path, tmp_path: Path) -> None:
    copy = _copy(model, tmp_path)
    tensors = load_file(copy / "model.safetensors")
    name = next(name for name in tensors if "down_proj" in name)
    tensors[name][0, 0] = torch.nan
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    _refused(run("-p", "x", target=copy), name)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("--max-length", "16", "-p", "x" * 30), ("prompt: is longer than the context", "at most 15")),
        (("--max-length", "16", "-p", "x", "--max-tokens", "100"), ("max_tokens: reaches past", "100")),
        (("--max-length", "99999", "-p", "x"), ("max_length: is longer", "512")),
        (("--max-tokens", "0", "-p", "x"), ("max_tokens: is out of range",)),
        (("--temperature", "-1", "-p", "x"), ("temperature: is out of range", "-1")),
        (("--temperature", "nan", "-p", "x"), ("temperature: is not a number",)),
        (("--top-p", "nan", "-p", "x"), ("top_p: is not a number",)),
        (("--top-p", "0", "-p", "x"), ("top_p: is out of range",)),
        (("--top-k", "-3", "-p", "x"), ("top_k: is out of range",)),
        (("--min-p", "-0.1", "-p", "x"), ("min_p: is out of range",)),
        (("--repetition-penalty", "-2", "-p", "x"), ("repetition_penalty: is out of range",)),
        (("--stop", "", "-p", "x"), ("stop: wants strings",)),
        (("-p", ""), ("prompt: is empty",)),
        (("-p", "caf\udce9"), ("prompt: is not UTF-8",)),
        (("--tree", "7/10", "-p", "x"), ("tree: is not a tree",)),
        (("--taps", "1,two", "-p", "x"), ("taps: wants whole numbers",)),
        (("--device", "cuda:77", "-p", "x"), ("device: cannot be used here",)),
        (("--memory", "1e300", "-p", "x"), ("memory: is no amount",)),
        (("--device-map", "{}", "-p", "x"), ("device_map: is no placement",)),
    ],
    ids=lambda value: " ".join(value)[:30] if isinstance(value, tuple) else None,
)
def test_a_bad_value(run: Run, words: Sequence[str], told: Sequence[str]) -> None:
    _refused(run(*words), *told)


def test_nothing_and_nonsense_on_standard_input(run: Run) -> None:
    _refused(run(stdin=b""), "prompt: is empty", "-p TEXT")
    _refused(run(stdin=b"caf\xe9 au lait"), "standard input: is not UTF-8 (byte 3)")


ROWS = {
    "": "holds no prompts",
    "not json": "is not JSON",
    "[1]": "is not an object",
    "{}": "has none of turns, messages, prompt",
    '{"prompt": ""}': "wants non-empty text",
    '{"prompt": 5}': "wants non-empty text",
    '{"turns": []}': "wants non-empty text",
    '{"messages": [{"role": "assistant", "content": "x"}]}': "a user message last",
    '{"messages": "x"}': "wants role and content",
    '{"id": ' + "1" * 5000 + ', "prompt": "x"}': "a number too long",
    "[" * 200_000: "lists too deep",
    '{"id": "\\ud800", "prompt": "x"}': "an id that is not valid Unicode",
}


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[:30])
def test_a_bad_row_of_prompts_is_named(run: Run, tmp_path: Path, row: str) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": "fine"}\n' * bool(row) + row)
    _refused(run("--prompts", str(file)), ROWS[row], "prompts.jsonl:2" if row else "prompts.jsonl")


def test_prompt_files_that_cannot_be_read(run: Run, tmp_path: Path) -> None:
    _refused(run("--prompts", str(tmp_path / "none.jsonl")), "does not exist")
    _refused(run("--prompts", str(tmp_path)), "cannot be read")
    (tmp_path / "latin").write_bytes(b"caf\xe9")
    _refused(run("--prompts", str(tmp_path / "latin")), "cannot be read")


def test_prompt_files_of_other_machines(run: Run, tmp_path: Path) -> None:
    """A mark at the start, lines that end in two characters, and separators of lines inside of a string."""
    file = tmp_path / "prompts.jsonl"
    rows = [
        json.dumps({"id": text, "prompt": "x"}, ensure_ascii=False) for text in ("a\u2028b", "c\x85d", "e")
    ]
    file.write_bytes(b"\xef\xbb\xbf" + "\r\n".join(rows).encode())
    code, out, err = run("--prompts", str(file), "--json", "--plain")
    assert code == 0, err
    assert [json.loads(line)["id"] for line in out.split("\n") if line] == ["a\u2028b", "c\x85d", "e"]


@pytest.mark.parametrize("flag", ["--limit", "--repeats"])
def test_a_bench_of_nothing_is_refused(specdec: Run, tmp_path: Path, flag: str) -> None:
    (file := tmp_path / "p.jsonl").write_text('{"prompt": "x"}')
    code, out, err = specdec("bench", "speed", "no-such-model", "--prompts", file, flag, "0")
    assert (code, out) == (2, "")
    assert f"{flag[2:]}: is out of range" in err


def test_what_the_system_refuses_is_one_line(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: object) -> int:
        raise OSError(28, "No space left on device", "here")

    monkeypatch.setattr("specdec.cli.generate.run", full)
    _refused(run("-p", "x"), "No space left on device", "here")


def test_unknown_options_are_refused(run: Run) -> None:
    code, _, err = run("-p", "x", "--temprature", "1")
    assert code == 2
    assert "--temprature" in err


def _rows(out: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in out.splitlines()]


def test_json_has_its_fields_and_dialogues_go_turn_by_turn(run: Run, tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    messages = [{"role": "system", "content": "s"}, {"role": "user", "content": "hi"}]
    lines = [{"id": "a", "turns": ["one", "two"]}, {"messages": messages}, {"prompt": "three"}]
    file.write_text("\n".join(map(json.dumps, lines)))
    code, out, err = run("--prompts", str(file), "--json", "--draft", "ngram")
    assert code == 0, err
    rows = _rows(out)
    assert [(row["id"], row["turn"]) for row in rows] == [
        ("a", 0), ("a", 1), ("prompts.jsonl:2", 0), ("prompts.jsonl:3", 0)
    ]  # fmt: skip
    for row in rows:
        assert set(row) == {"id", "turn", "text", "token_ids", "finish_reason", "prompt_tokens", "stats"}
        assert row["finish_reason"] == "length"
        assert len(row["token_ids"]) == 8
        assert {"tau", "alpha", "rounds", "tokens_per_second", "seconds"} <= row["stats"].keys()
        assert set(row["stats"]["seconds"]) == {"prefill", "draft", "verify", "accept"}
    history = f"u:one\na:{rows[0]['text']}\nu:two\na:"
    assert rows[1]["prompt_tokens"] == len(history), "the second turn does not see the first answer"
    assert rows[2]["prompt_tokens"] == len("s:s\nu:hi\na:")
    assert "drafter ngram" in err


def test_plain_and_drafted_answers_are_the_same(run: Run) -> None:
    plain = _rows(run("-p", "abcabcabc", "--json", "--plain")[1])[0]
    fast = _rows(run("-p", "abcabcabc", "--json", "--draft", "ngram", "--tree", "auto")[1])[0]
    assert plain["token_ids"] == fast["token_ids"]
    assert plain["stats"]["drafted"] == 0
    assert run("--draft", "ngram", stdin=b"abcabcabc\n")[1] == plain["text"] + "\n"
    coloured = run("-p", "abcabcabc", "--draft", "ngram", "--show-tree")[1]
    assert coloured.replace("\x1b[32m", "").replace("\x1b[0m", "") == plain["text"] + "\n"


def test_a_target_without_template_continues_the_text(run: Run, model: Path, tmp_path: Path) -> None:
    copy = _copy(model, tmp_path)
    for file in copy.glob("*.jinja"):
        file.unlink()
    settings = json.loads((copy / "tokenizer_config.json").read_text())
    settings.pop("chat_template", None)
    (copy / "tokenizer_config.json").write_text(json.dumps(settings))
    code, out, err = run("-p", "abc", "--json", "--plain", target=copy)
    assert code == 0, err
    assert _rows(out)[0]["prompt_tokens"] == 3
    assert (
        _rows(out)[0]["token_ids"] == _rows(run("-p", "abc", "--json", "--plain", "--raw")[1])[0]["token_ids"]
    )


def test_a_terminal_is_told_that_it_is_read(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Terminal(io.TextIOWrapper):
        def isatty(self) -> bool:
            return True

    monkeypatch.setattr(sys, "stdin", Terminal(io.BytesIO(b"hi\n")))
    assert read_stdin() == "hi"
    out, err = capsys.readouterr()
    assert out == "" and "Ctrl-D" in err


@pytest.mark.parametrize("name", ["[red]model", "[/]"])
def test_names_with_brackets_are_names(specdec: Run, model: Path, tmp_path: Path, name: str) -> None:
    shutil.copytree(model, copy := tmp_path / name)
    code, _, err = specdec("generate", copy, *FAST, "--plain", "-p", "x")
    assert code == 0 and f"{copy}: " in err
    code, out, _ = specdec("inspect", copy, *FAST[:4], "--draft", "none")
    assert code == 0 and name in out


def test_ctrl_c_keeps_what_came(model: Path, tmp_path: Path) -> None:
    words = ["generate", str(model), *FAST[:6], "-p", "abc", "--ignore-eos", "--plain"]
    script = "from specdec.cli.main import main; import sys; sys.exit(main())"
    # without the C kernels, which an empty cache would first have to compile
    environment = {
        **os.environ,
        "SPECDEC_CACHE": str(tmp_path),
        "SPECDEC_NATIVE": "0",
        "OMP_NUM_THREADS": "1",
    }
    slow = (  # a step takes so long that the answer cannot end before the signal comes
        "import time; from specdec.engine.engine import Engine; step = Engine.step\n"
        "Engine.step = lambda self: (time.sleep(0.05), step(self))[1]\n"
        # a shell that runs the tests in the background has Ctrl-C ignored, and children inherit that
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", slow + script, *words, "--max-tokens", "400", "--show-tree"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment,
    ) as process:  # fmt: skip
        assert process.stdout is not None
        first = process.stdout.read(1)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=120)
    assert process.returncode == 130, err.decode()
    assert first
    assert out.endswith(b"\n")
    assert b"Traceback" not in err


def test_an_interrupted_json_answer_is_a_cancelled_row(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    from specdec.engine.engine import Engine

    step, steps = Engine.step, []

    def interrupted(self: Engine) -> Any:
        steps.append(1)
        if len(steps) == 5:
            raise KeyboardInterrupt
        return step(self)

    monkeypatch.setattr(Engine, "step", interrupted)
    code, out, _ = run("-p", "abc", "--json", "--plain")
    (row,) = _rows(out)
    assert code == 130
    assert row["finish_reason"] == "cancelled"
    assert len(row["token_ids"]) == 5
    assert len(row["text"]) >= 1


def test_a_failing_answer_is_told_and_ends_with_code_one(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    from specdec.target.load import LeanTarget

    logits = LeanTarget.logits
    monkeypatch.setattr(LeanTarget, "logits", lambda self, final: logits(self, final) * torch.nan)
    monkeypatch.setattr("specdec.target.load.self_test", lambda target: None)
    code, out, err = run("-p", "abc", "--json", "--plain")
    assert code == 1
    assert _rows(out)[0]["finish_reason"] == "error"
    assert "NaN" in err


def test_the_package_runs_as_a_program() -> None:
    done = subprocess.run([sys.executable, "-m", "specdec", "--version"], capture_output=True, text=True)
    assert (done.returncode, done.stdout.split()[0]) == (0, "specdec")
    assert subprocess.run([sys.executable, "-m", "specdec", "serv"], capture_output=True).returncode == 2


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a full disk")
@pytest.mark.parametrize(
    ("shell", "code", "told"),
    [("{} --help > /dev/full", 2, "specdec: [Errno 28]"), ("{} generate --help > /dev/full", 2, "specdec generate: [E"),
     ("{} generate -h | true; exit ${{PIPESTATUS[0]}}", 0, ""), ("{} --version >&-", 0, ""),
     ("{} generate <&-", 2, "prompt: is empty")],
)  # fmt: skip
def test_output_that_nobody_takes_and_input_that_nobody_gives(shell: str, code: int, told: str) -> None:
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONUNBUFFERED"}
    line = shell.format(f"{sys.executable} -m specdec")
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, env=environment)
    assert done.returncode == code
    assert "Traceback" not in done.stderr and "Exception ignored" not in done.stderr
    assert told in done.stderr and bool(told) == bool(done.stderr)
