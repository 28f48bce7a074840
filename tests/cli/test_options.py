"""The options of every verb, frozen: adding one is a decision, and so is its name. Help does not wait for torch."""

from __future__ import annotations

import argparse
import subprocess
import sys

import pytest

from specdec.cli.main import VERBS, parser
from specdec.cli.options import SETTINGS, sampling_of
from specdec.sampling import Sampling

MODEL = "target --dtype --device --device-map --max-length --memory --backend "
DRAFT = "--draft --tree --taps "
SAMPLING = (
    "--temperature --top-p --top-k --min-p --repetition-penalty --max-tokens --seed --stop --ignore-eos "
)
FROZEN = {
    "generate": MODEL + DRAFT + SAMPLING + "--prompt --prompts --plain --raw --show-tree --slots --json",
    "chat": MODEL + DRAFT + SAMPLING + "--system --show-tree",
    "serve": MODEL + DRAFT + "--host --port --plain --slots --queue --api-key --burst --served-model-name "
    "--request-timeout --drain-timeout",
    "train": "--target --prompts --out --recipe overrides --dry-run --max-minutes --no-resume --endpoint "
    "--feature-cache-gb --push-to-hub",
    "report": "--target --head --prompts --out --budget --temperature --seed --taps --dtype --device --force --work "
    "--json --compare --rank --self-check",
    "inspect": MODEL + DRAFT + "--json",
    "export": "head --check --format --target --taps --out",
    "demo": MODEL + DRAFT + "--max-tokens",
    "bench speed": MODEL + SAMPLING + "--prompts --drafts --tree --limit --repeats --no-transformers --json",
}


def _sub(words: str) -> argparse.ArgumentParser:
    found = parser(words.split()[0])
    for word in words.split():
        (choices,) = (a.choices for a in found._actions if isinstance(a, argparse._SubParsersAction))
        assert choices is not None
        found = choices[word]
    return found


@pytest.mark.parametrize("verb", FROZEN)
def test_the_options_of_a_verb_are_these(verb: str) -> None:
    actions = [a for a in _sub(verb)._actions if not isinstance(a, argparse._HelpAction)]
    assert {(a.option_strings or [a.dest])[-1] for a in actions} == set(FROZEN[verb].split())


def test_what_is_not_given_keeps_the_librarys_default() -> None:
    assert sampling_of(parser("generate").parse_args(["generate"])) == Sampling()
    assert sampling_of(parser("chat").parse_args(["chat"])).max_tokens == 512
    assert parser("demo").parse_args(["demo"]).dtype == "float32"
    words = ["generate", "--temperature", "0.5", "--top-p", "0.9", "--top-k", "4", "--min-p", "0.1",
             "--repetition-penalty", "1.1", "--max-tokens", "7", "--seed", "3", "--ignore-eos",
             "--stop", "a", "--stop", "b"]  # fmt: skip
    given = sampling_of(parser("generate").parse_args(words))
    assert [getattr(given, name) for name in SETTINGS] == [0.5, 0.9, 4, 0.1, 1.1, 7, 3]
    assert (given.stop, given.ignore_eos) == (("a", "b"), True)


def test_help_of_every_verb_comes_without_torch() -> None:
    assert set(VERBS) == {verb.split()[0] for verb in FROZEN}
    script = (
        "import sys\nfrom specdec.cli.main import main\n"
        f"for words in [[v] for v in {[*VERBS]!r}] + [[], ['bench', 'speed']]:\n"
        "    try: main([*words, '--help'])\n"
        "    except SystemExit as end: assert end.code == 0, words\n"
        "    heavy = {'torch', 'transformers', 'numpy', 'rich'} & set(sys.modules)\n"
        "    assert not heavy, (words, heavy)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("usage: specdec") == len(VERBS) + 2
