"""Conformance of exported heads: another engine must show our text and our counters, integer for integer.

Acceptance alone is too blunt: a wrong residual changes one accepted token in a thousand. So a chain of K
greedy drafts in float32 is run three times per layout: by a plain forward (chain.py), by our engine, and by
vLLM.

    python -m bench.conformance --vllm-python ENV/bin/python [--target DIR --head DIR --prompts FILE]
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from bench.chain import Counters, chain_counters
from specdec.drafting.protocol import Shape
from specdec.engine.build import Options
from specdec.engine.request import Request
from specdec.errors import SpecdecError
from specdec.generate import SpecDecoder
from specdec.head.checkpoint import load_head
from specdec.head.export import TargetNames, save_raw, save_speculators
from specdec.sampling import Sampling
from specdec.stats import Round

SLOTS = 8


@dataclass(frozen=True, slots=True)
class Trial:
    """One conformance run: directories, token-id prompts, lengths."""

    target: Path
    head: Path
    prompts: tuple[tuple[int, ...], ...]
    draft_tokens: int
    max_tokens: int

    @property
    def max_length(self) -> int:
        """Context that no draft can overrun."""
        return max(map(len, self.prompts)) + self.max_tokens + 2 * self.draft_tokens + 2


class _Depths:
    """Accepted drafts by depth, rounds that end an answer included, as vLLM counts them."""

    def __init__(self, depth: int) -> None:
        self.drafts, self.per_position = 0, [0] * depth

    def record(self, round: Round) -> None:
        for count in round.verdict.counts.tolist():
            self.drafts += 1
            for depth in range(count - 1):
                self.per_position[depth] += 1


def our_counters(trial: Trial) -> Counters:
    """The trial in our engine: lean or adapted target, chain-shaped trees, requests batched."""
    shape = Shape(trial.draft_tokens, 1, trial.draft_tokens + 1)
    options = Options(torch.float32, "cpu", SLOTS, trial.max_length, shape)
    decoder = SpecDecoder.from_pretrained(str(trial.target), trial.head, options)
    decoder.engine.recorder = depths = _Depths(trial.draft_tokens)
    settings = Sampling(max_tokens=trial.max_tokens, ignore_eos=True)
    requests = [Request(str(i), ids, settings, frozenset()) for i, ids in enumerate(trial.prompts)]
    for request in requests:
        decoder.engine.add(request)
    while decoder.engine.busy:
        for piece in decoder.engine.step():
            if piece.error:
                raise RuntimeError(piece.error)
    texts = tuple(tuple(request.output) for request in requests)
    return Counters(texts, depths.drafts, sum(depths.per_position), tuple(depths.per_position))


def vllm_counters(trial: Trial, python: Path, scratch: Path) -> Counters:
    """The trial in vLLM, run by the interpreter of its own environment.

    Raises:
        SpecdecError: vLLM failed; its log is named.
    """
    job, result, log = (scratch / f"{trial.head.name}.{end}" for end in ("job.json", "result.json", "log"))
    job.write_text(json.dumps(_job(trial)), encoding="utf-8")
    script = Path(__file__).with_name("conformance_vllm.py")
    environment = {
        **os.environ,
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "HF_HUB_OFFLINE": "1",
        "PYTHONSAFEPATH": "1",  # files beside the script must not shadow modules that vLLM imports
    }
    with log.open("wb") as out:
        command = [str(python), str(script), str(job), str(result)]
        status = subprocess.run(command, stdout=out, stderr=out, env=environment, check=False).returncode
    if status or not result.is_file():
        raise SpecdecError("did not finish", field="vllm", value=status, remedy=f"Its log is {log}.")
    found = json.loads(result.read_text(encoding="utf-8"))
    texts = tuple(map(tuple, found["token_ids"]))
    return Counters(texts, found["drafts"], found["accepted"], tuple(found["per_position"]))


def _job(trial: Trial) -> dict[str, Any]:
    fields = {"target": str(trial.target.resolve()), "head": str(trial.head.resolve())}
    return {**asdict(trial), **fields, "dtype": "float32", "max_length": trial.max_length}


def tiny_trials(scratch: Path, prompts: int = 32, draft_tokens: int = 3, max_tokens: int = 52) -> list[Trial]:
    """A tiny pair on disk, the head in both layouts."""
    from bench.tiny_pair import random_prompts, taught_head, tiny_target

    target = scratch / "target"
    names = TargetNames(str(target.resolve()), bos=1, eos=2)
    head = taught_head(tiny_target(target))
    save_raw(head, scratch / "raw", target=names, dtype=torch.float32)
    save_speculators(head, scratch / "speculators", target=names, dtype=torch.float32, tokens=draft_tokens)
    ids = tuple(map(tuple, random_prompts(prompts)))
    return [Trial(target, scratch / name, ids, draft_tokens, max_tokens) for name in ("raw", "speculators")]


def real_trials(arguments: argparse.Namespace, scratch: Path) -> list[Trial]:
    """A given pair: the head as it lies, and exported to the other layout."""
    config = json.loads((arguments.target / "config.json").read_text(encoding="utf-8"))
    head = load_head(arguments.head, target_layers=config["num_hidden_layers"])
    names = TargetNames(str(arguments.target.resolve()), tuple(config["architectures"]))
    other = save_speculators(
        head, scratch / "speculators", target=names, dtype=head.dtype, tokens=arguments.draft_tokens
    )
    ids = tuple(read_prompts(arguments.prompts, arguments.target, arguments.limit))
    lengths = (arguments.draft_tokens, arguments.max_tokens)
    return [Trial(arguments.target, path, ids, *lengths) for path in (arguments.head, other)]


def read_prompts(path: Path, target: Path, limit: int) -> list[tuple[int, ...]]:
    """Token ids of the first `limit` rows of a jsonl file with `turns` (the first is taken) or `prompt`."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(target)
    found = []
    for line in path.read_text(encoding="utf-8").splitlines()[:limit]:
        row = json.loads(line)
        user = [{"role": "user", "content": row["turns"][0] if "turns" in row else row["prompt"]}]
        ids = tokenizer.apply_chat_template(
            user, add_generation_prompt=True, tokenize=True, return_dict=False
        )
        found.append(tuple(ids))
    return found


def judge(trial: Trial, python: Path | None, scratch: Path) -> bool:
    """Run a trial everywhere, tell the counters, and say whether all agree."""
    runs = {"plain forward": chain_counters(trial.target, trial.head, trial.prompts,
                                            draft_tokens=trial.draft_tokens, max_tokens=trial.max_tokens),
            "specdec": our_counters(trial)}  # fmt: skip
    if python is not None:
        runs["vLLM"] = vllm_counters(trial, python, scratch)
    told = [f"{trial.head.name}: {len(trial.prompts)} prompts, K = {trial.draft_tokens}"]
    for name, run in runs.items():
        same = sum(a == b for a, b in zip(run.token_ids, runs["plain forward"].token_ids, strict=True))
        told.append(f"  {name:14} text equal {same}/{len(run.token_ids)}  drafts {run.drafts}  "
                    f"accepted {run.accepted}  per position {list(run.per_position)}")  # fmt: skip
    agree = len(set(runs.values())) == 1
    sys.stdout.write("\n".join([*told, f"  {'EQUAL' if agree else 'DIFFERENT'}", ""]))
    sys.stdout.flush()
    return agree


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status 0 when every layout agrees everywhere."""
    parser = argparse.ArgumentParser(
        prog="bench.conformance", description=__doc__.splitlines()[0] if __doc__ else ""
    )
    parser.add_argument("--vllm-python", type=Path, help="interpreter with vllm; without it vLLM is left out")
    parser.add_argument("--target", type=Path, help="directory of a real target")
    parser.add_argument("--head", type=Path, help="directory of a real head")
    parser.add_argument("--prompts", type=Path, help="jsonl with turns or prompt")
    parser.add_argument("--limit", type=int, default=8, help="prompts of a real pair")
    parser.add_argument(
        "--out", type=Path, help="where directories and logs go (default: a temporary directory)"
    )
    parser.add_argument("--draft-tokens", type=int, default=3)
    parser.add_argument("--max-tokens", type=int, default=52)
    arguments = parser.parse_args(argv)
    real = (arguments.target, arguments.head, arguments.prompts)
    if any(real) and not all(real):
        parser.error("a real pair needs --target, --head and --prompts")
    scratch = arguments.out or Path(tempfile.mkdtemp(prefix="specdec-conformance-"))
    scratch.mkdir(parents=True, exist_ok=True)
    if arguments.target:
        trials = real_trials(arguments, scratch)
    else:
        trials = tiny_trials(scratch, 32, arguments.draft_tokens, arguments.max_tokens)
    return 0 if all([judge(trial, arguments.vllm_python, scratch) for trial in trials]) else 1


if __name__ == "__main__":
    sys.exit(main())
