"""Runs one head in vLLM as a chain, writes text and counters; executed by the environment of vLLM.

Reads a job file and imports nothing of specdec: the two sides share files only.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

COUNTERS = {
    "vllm:spec_decode_num_drafts": "drafts",
    "vllm:spec_decode_num_accepted_tokens": "accepted",
    "vllm:spec_decode_num_accepted_tokens_per_pos": "per_position",
}


def run(job: dict[str, Any]) -> dict[str, Any]:
    """Greedy, eager, one pass over token-id prompts.

    Args:
        job: target, head, dtype, prompts (token ids), max_tokens, draft_tokens, max_length.

    Returns:
        {"token_ids", "drafts", "accepted", "per_position"}.
    """
    from vllm import LLM, SamplingParams  # type: ignore[import-not-found]

    engine = LLM(
        model=job["target"],
        skip_tokenizer_init=True,
        dtype=job["dtype"],
        enforce_eager=True,
        max_model_len=job["max_length"],
        max_num_seqs=8,
        enable_prefix_caching=False,
        disable_log_stats=False,
        speculative_config={
            "method": "eagle3",
            "model": job["head"],
            "num_speculative_tokens": job["draft_tokens"],
        },
    )
    settings = SamplingParams(
        temperature=0.0, max_tokens=job["max_tokens"], ignore_eos=True, detokenize=False
    )
    prompts = [{"prompt_token_ids": ids} for ids in job["prompts"]]
    outputs = engine.generate(prompts, settings, use_tqdm=False)
    found: dict[str, Any] = {"token_ids": [list(output.outputs[0].token_ids) for output in outputs]}
    for metric in engine.get_metrics():
        if metric.name in COUNTERS:
            name = COUNTERS[metric.name]
            found[name] = list(metric.values) if name == "per_position" else int(metric.value)
    return found


def main() -> None:
    """conformance_vllm.py JOB.json RESULT.json"""
    job_path, result_path = Path(sys.argv[1]), Path(sys.argv[2])
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    result = run(json.loads(job_path.read_text(encoding="utf-8")))
    result_path.write_text(json.dumps(result), encoding="utf-8")


if __name__ == "__main__":
    main()
