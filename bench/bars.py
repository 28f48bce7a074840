"""What the GPU path must show, and whether the rows of a run show it: PASS, FAIL or unmeasured, with the figures.

Reads rows, knows no device. Figures of smoke runs mean nothing, and neither do verdicts on them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.table import Table

Row = Mapping[str, Any]
Rows = Mapping[str, Sequence[Row]]
"""By file: kernels, steps, speed, sweep, gpu."""

RANDOM, REAL = "random-8b", "smollm2-135m"
# top-2 logit gap below which bf16 may part ways: twice the spacing of bf16 logits between 16 and 32
GAP = 0.5
PASS, FAIL, UNMEASURED = "PASS", "FAIL", "unmeasured"


@dataclass(frozen=True, slots=True)
class Bar:
    """One bar: what it asks, what was found, the verdict."""

    name: str
    verdict: str
    found: str


def judge(rows: Rows) -> list[Bar]:
    """Every bar, in order."""
    return [check(rows) for check in (_plain_8b, _plain_real, _verify, _round, _speed, _generate, _attention, _sweep,
                                      _float32, _bfloat16, _memory)]  # fmt: skip


def _bar(name: str, values: Sequence[float], holds: Callable[[float], bool], worst: Callable[..., float],
         unit: str = "") -> Bar:  # fmt: skip
    """The worst value decides."""
    if not values:
        return Bar(name, UNMEASURED, "")
    found = worst(values)
    told = f"{found:.3g}{unit}" + (f" (worst of {len(values)})" if len(values) > 1 else "")
    return Bar(name, PASS if holds(found) else FAIL, told)


def _steps(rows: Rows, target: str, nodes: int) -> list[Row]:
    return [r for r in rows.get("steps", ()) if r.get("target") == target and r.get("batch") == 1
            and r.get("nodes") == nodes and "captured_ms" in r]  # fmt: skip


def _rounds(rows: Rows, target: str) -> list[Row]:
    return [r for r in rows.get("steps", ()) if r.get("target") == target and r.get("batch") == 1
            and "captured_round_ms" in r]  # fmt: skip


def _plain_8b(rows: Rows) -> Bar:
    shares = [
        r["token_floor_ms"] / r["captured_token_ms"] for r in _rounds(rows, RANDOM) if "token_floor_ms" in r
    ]
    return _bar("1 plain 8B shape >= 80% of the bandwidth floor", shares, lambda x: x >= 0.8, min)


def _plain_real(rows: Rows) -> Bar:
    rates = [r["decode_tokens_per_second"] for r in _speed_rows(rows) if r["system"] == "plain"
             and "decode_tokens_per_second" in r]  # fmt: skip
    return _bar("1 plain SmolLM2 >= 1,500 tok/s after the prefill", rates, lambda x: x >= 1500, min)


def _verify(rows: Rows) -> Bar:
    one, many = _steps(rows, RANDOM, 1), _steps(rows, RANDOM, 64)
    ratios = [many[-1]["captured_ms"] / one[-1]["captured_ms"]] if one and many else []
    return _bar("1 verify of 64 nodes <= 1.12x one token, 8B shape", ratios, lambda x: x <= 1.12, max)


def _round(rows: Rows) -> Bar:
    rounds = _rounds(rows, RANDOM)
    ratios = [r["captured_round_ms"] / (r["captured_verify_ms"] + r["captured_draft_ms"]) for r in rounds]
    bar = _bar("2 a round <= 1.15x verify + draft alone, 8B shape", ratios, lambda x: x <= 1.15, max)
    floors = [r["captured_round_ms"] / r["floor_ms"] for r in rounds if "floor_ms" in r]
    return (
        Bar(bar.name, bar.verdict, f"{bar.found}; {floors[-1]:.2f}x the bandwidth floor") if floors else bar
    )


def _speed_rows(rows: Rows) -> list[Row]:
    return [r for r in rows.get("speed", ()) if r.get("temperature") == 0]


def _speed(rows: Rows) -> Bar:
    ratios = [r["over_plain"] for r in _speed_rows(rows) if r["system"] == "head"]
    bar = _bar("2 SmolLM2 with its head >= 2x our plain loop, every set", ratios, lambda x: x >= 2, min)
    mean = f"; mean {sum(ratios) / len(ratios):.2f}" if ratios else ""
    return Bar(bar.name, bar.verdict, bar.found + mean)


def _generate(rows: Rows) -> Bar:
    ratios = [r["over_transformers"] for r in _speed_rows(rows)
              if r["system"] == "head" and "over_transformers" in r]  # fmt: skip
    return _bar("2 SmolLM2 with its head >= 8x transformers generate", ratios, lambda x: x >= 8, min)


def _attention(rows: Rows) -> Bar:
    name = "3 triton >= the best other tree attention, batch 1-8, N 16-64"
    points: dict[tuple[Any, ...], dict[str, float]] = {}
    for r in rows.get("kernels", ()):
        if r["kind"] == "attention" and "us" in r and not r["wrong"] and r["batch"] <= 8 and r["nodes"] >= 16:
            point = (r["model"], r["length"], r["batch"], r["nodes"])
            points.setdefault(point, {})[r["backend"]] = r["us"]
    measured = {p: times for p, times in points.items() if "triton" in times and len(times) > 1}
    if not measured:
        return Bar(name, UNMEASURED, "")
    slower = {p: min(times, key=times.__getitem__) for p, times in measured.items()
              if min(times.values()) < times["triton"]}  # fmt: skip
    listed = "; ".join(f"{best} at {' '.join(map(str, p))}" for p, best in list(slower.items())[:6])
    found = f"{len(measured) - len(slower)} of {len(measured)} points" + (
        f"; faster: {listed}" if slower else ""
    )
    return Bar(name, FAIL if slower else PASS, found)


def _sweep(rows: Rows) -> Bar:
    ratios = [r["over_plain"] for r in rows.get("sweep", ())]
    return _bar("4 batch sweep never below 0.97x plain", ratios, lambda x: x >= 0.97, min)


def _greedy(rows: Rows, dtype: str) -> list[Row]:
    return [r for r in rows.get("gpu", ()) if r["kind"] == "greedy" and r["dtype"] == dtype]


def _float32(rows: Rows) -> Bar:
    runs = _greedy(rows, "torch.float32")
    apart = [d["gap"] for r in runs for d in r["divergences"]]
    if not runs:
        return Bar("5 float32 greedy equals plain", UNMEASURED, "")
    prompts = sum(r["prompts"] for r in runs)
    told = f"{prompts - len(apart)} of {prompts} answers" + (
        f", largest gap {max(apart):.2g}" if apart else ""
    )
    return Bar("5 float32 greedy equals plain", FAIL if apart else PASS, told)


def _bfloat16(rows: Rows) -> Bar:
    runs = _greedy(rows, "torch.bfloat16")
    gaps = [d["gap"] for r in runs for d in r["divergences"]] or ([0.0] if runs else [])
    return _bar(f"5 bf16 parts only at top-2 gaps <= {GAP}", gaps, lambda x: x <= GAP, max)


def _memory(rows: Rows) -> Bar:
    runs = [r for r in rows.get("gpu", ()) if r["kind"] == "stage" and r["stage"] == "memcheck"]
    if not runs or runs[-1]["status"] == "absent":
        return Bar("5 compute-sanitizer memcheck clean", UNMEASURED, "")
    clean = runs[-1]["status"] == "done"
    return Bar("5 compute-sanitizer memcheck clean", PASS if clean else FAIL, str(runs[-1]["status"]))


def table(bars: Iterable[Bar]) -> Table:
    """One line per bar."""
    made = Table("bar", "verdict", "found")
    for bar in bars:
        made.add_row(bar.name, bar.verdict, bar.found)
    return made
