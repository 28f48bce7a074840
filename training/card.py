"""What is written beside a finished head: a model card and a plot of the run.

Knows measured rows and names; measures nothing itself.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from specdec.head.config import HeadConfig
from specdec.places import replacing
from training.build import Vocabulary
from training.recipe import Recipe
from training.watch import LOG, read_log


@dataclass(frozen=True, slots=True)
class Story:
    """What the card tells.

    Attributes:
        target: its name.
        config: of the head.
        recipe: of the run.
        sources, licences: conversations used, by name.
        tokens: of training text, answers and prompts; visits: tokens the head read, epochs included.
        vocabulary: the draft vocabulary, with what it holds and what is outside.
        minutes: the run took; device: it ran on.
        measured: the best evaluation, empty when there was none.
    """

    target: str
    config: HeadConfig
    recipe: Recipe
    sources: Counter[str]
    licences: Counter[str]
    tokens: int
    visits: int
    vocabulary: Vocabulary
    minutes: float
    device: str
    measured: dict[str, Any]


def write_card(directory: Path, story: Story) -> None:
    """README.md of the head."""
    c = story.config
    given = story.recipe.data.answers == "given"
    dev = "that came with the data, a lower bound for the target's own" if given else "the target wrote"
    whose, written = ("the data", "the answers") if given else ("the target", "what the target wrote")
    text = f"""---
tags: [eagle3, speculative-decoding]
base_model: {story.target}
---
# EAGLE-3 draft head for {story.target}

A raw EAGLE-3 checkpoint trained with `specdec train`. It drafts; the target decides: outputs are the target's own.

    specdec generate {story.target} --draft PATH

## Measured
{_measured(story)}

*tau* is the number of tokens that one forward of the target yields, the bonus token included; plain decoding has 1.
It is simulated on held-out text {dev}, with the decoder's own acceptance. *alpha(d)* is the
share of guesses accepted at depth d, among those whose depth d - 1 was. A tree has 60 nodes, depth 7 and 10 children a
node; a chain has no branches.

## Made from
- taps (layer inputs) {", ".join(map(str, c.taps))}; draft vocabulary {c.draft_vocab:,} of {c.vocab:,}, which holds
  {describe(story.vocabulary, written)}
- {story.tokens:,} tokens of text answered by {whose}, {story.visits:,} token visits, {story.minutes:.0f} minutes
  on {story.device}
- start: {story.recipe.head.start}
- target fingerprint `{c.fingerprint}`, recipe hash `{story.recipe.hash()}` (see `recipe.yaml`)

## Data
{_table("source", story.sources)}

{_table("licence", story.licences)}
"""
    with replacing(directory / "README.md") as fresh:
        fresh.write_text(text, encoding="utf-8")


def describe(vocabulary: Vocabulary, written: str = "the answers") -> str:
    """What a draft vocabulary holds, and what acceptance it gives up."""
    told = f"{vocabulary.coverage:.2%} of {written}"
    if vocabulary.outside is None:
        return told
    lost = vocabulary.outside
    return (f"{told}; outside are {lost.mass:.2%} of the target's probability and its likeliest token at "
            f"{lost.argmax:.2%} of positions, which no draft can match")  # fmt: skip


def _measured(story: Story) -> str:
    rows = ["| dev text | tau, tree | tau, chain | alpha(1..7), tree |", "|---|---|---|---|"]
    for name in ("greedy", "sampled"):
        if name in story.measured:
            row = story.measured[name]
            alpha = " ".join(f"{value:.2f}" for value in row["alpha"])
            kind = "given" if story.recipe.data.answers == "given" else name
            rows.append(f"| {kind} | {row['tau']:.2f} | {row['tau_chain']:.2f} | {alpha} |")
    return "\n".join(rows) if len(rows) > 2 else "Nothing: there was no dev text."


def _table(title: str, counts: Counter[str]) -> str:
    rows = [f"| {title} | conversations |", "|---|---|"]
    return "\n".join(rows + [f"| {name} | {count:,} |" for name, count in counts.most_common()])


def draw(directory: Path) -> Path | None:
    """training.png from train_log.jsonl: loss by step, alpha by depth, simulated tau. None without matplotlib."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return None
    steps = read_log(directory / LOG, "step")
    measured = read_log(directory / LOG, "evaluation")
    figure = Figure(figsize=(12, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    loss, overlap, tau = figure.subplots(1, 3)
    for depth in range(max((len(row["loss"]) for row in steps), default=0)):
        part = [row for row in steps if len(row["loss"]) > depth]
        minutes = [row["seconds"] / 60 for row in part]
        loss.plot(minutes, [row["loss"][depth] for row in part], lw=0.8, label=f"step {depth}")
        overlap.plot(minutes, [row["overlap"][depth] for row in part], lw=0.8, label=f"alpha({depth + 1})")
    for name in ("greedy", "sampled"):
        part = [row for row in measured if name in row]
        tau.plot([row["seconds"] / 60 for row in part], [row[name]["tau"] for row in part], "o-", label=name)
    titles = (
        "loss on training text, nats",
        "overlap with the target, training text",
        "simulated tau, dev text",
    )
    for axes, title in zip((loss, overlap, tau), titles, strict=True):
        axes.set(xlabel="minutes", title=title)
        if axes.lines:
            axes.legend(fontsize=7)
    path = directory / "training.png"
    with replacing(path) as fresh:
        figure.savefig(fresh, dpi=110)
    return path
