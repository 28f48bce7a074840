"""The report, stage by stage: capture -> estimate -> score the head -> decode -> judge -> values.

Every stage leaves its result in the working directory under a key of its inputs, so an interrupted run goes on where
it stopped. Knows targets, heads and passages; no file of prompts, no terminal, no page.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from specdec.head.config import default_taps
from specdec.head.match import check_match
from specdec.head.model import DraftHead
from specdec.surplus import landscape, measure
from specdec.surplus.account import engine_row, predicted_tau, selection, waterfall
from specdec.surplus.brief import Finals, beginning, finals
from specdec.surplus.capture import (
    CaptureSettings,
    Passage,
    capture,
    check_layers,
    digest,
    documents,
    load_captured,
    load_floor,
    target_head,
)
from specdec.surplus.draft import DraftRows, HeadReader, ReadSettings, gather
from specdec.surplus.estimate import Estimate
from specdec.surplus.folds import split_roles
from specdec.surplus.forecasts import align
from specdec.surplus.material import Material, prepare
from specdec.surplus.mixture import Brief
from specdec.surplus.outcome import Measured, decode
from specdec.surplus.plan import (
    Plan,
    TapSet,
    candidate_taps,
    check_documents,
    name_of,
)
from specdec.surplus.recorder import TreeShape
from specdec.surplus.rows import columns_of, group_numbers, load_tensors, save_tensors
from specdec.surplus.shards import Manifest, write_text
from specdec.surplus.values import VERSION, Value, clean
from specdec.surplus.verdicts import Evidence, judge, without_head
from specdec.surplus.windows import longest, windowed
from specdec.target.protocol import Target

Say = Callable[[str, int, int], None]
"""Progress: (stage, done, of)."""
Parts = list[tuple[Mapping[str, str | int], Mapping[str, Tensor]]]


@dataclass(frozen=True, slots=True)
class Order:
    """What is to be reported.

    Attributes:
        target: loaded.
        passages: prompts as token ids, any number; the plan takes as many as it wants, balanced over domains.
        plan: budget.
        work: directory of captured text and stages, kept until the report is written.
        head: frozen draft head, or None for a plan report.
        tap_sets: to rank; empty takes the candidates. The head's taps always lead.
        temperature, seed: of serving, and of everything drawn.
        told: what the report says of its making (command, versions, names).
    """

    target: Target
    passages: tuple[Passage, ...]
    plan: Plan
    work: Path
    head: DraftHead | None = None
    tap_sets: tuple[TapSet, ...] = ()
    temperature: float = 1.0
    seed: int = 0
    told: Mapping[str, Any] | None = None


@dataclass(frozen=True, slots=True)
class Roles:
    """Which passages predict and whose acceptance is measured; disjoint, no prompt twice."""

    predictors: tuple[Passage, ...]
    outcomes: tuple[Passage, ...]


@dataclass(frozen=True, slots=True)
class Report:
    """Values of report.json, and per-context rows for parquet."""

    values: Value
    rows: Parts


def assign_roles(passages: Sequence[Passage], plan: Plan, *, head: bool, seed: int = 0) -> Roles:
    """Choose passages, balanced over domains, and deal them into roles.

    Raises:
        RequestError: too little text; the message says how many prompts are needed.
    """
    unique = list({p.prompt: p for p in passages}.values())
    check_documents(plan, len(unique), head=head)
    chosen = _balanced(unique, plan.documents)
    if not head:
        return Roles(tuple(chosen[: plan.predictors]), ())
    doc, domain = torch.arange(len(chosen)), group_numbers([p.domain for p in chosen])
    first, second = split_roles(doc, outcome=plan.outcome_share, seed=seed, domain=domain)
    predictors = tuple(chosen[i] for i in first.tolist()[: plan.predictors])
    return Roles(predictors, tuple(chosen[i] for i in second.tolist()[: plan.outcomes]))


def _balanced(passages: Sequence[Passage], count: int) -> list[Passage]:
    """Round robin over domains, in order within each."""
    queues: dict[str, list[Passage]] = {}
    for passage in passages:
        queues.setdefault(passage.domain, []).append(passage)
    chosen: list[Passage] = []
    while len(chosen) < count and any(queues.values()):
        chosen += [queue.pop(0) for queue in queues.values() if queue]
    return chosen[:count]


def tap_sets_of(order: Order) -> tuple[TapSet, ...]:
    """The tap sets to measure, the main one first. Raises RequestError for a layer that is not there."""
    layers = order.target.info.layers
    own = (order.head.config.taps,) if order.head is not None else ()
    wanted = dict.fromkeys((*own, *(order.tap_sets or candidate_taps(layers) or (default_taps(layers),))))
    for taps in wanted:
        check_layers(taps, layers)
    return tuple(wanted)


def run(order: Order, say: Say = lambda stage, done, of: None) -> Report:
    """Make a report's values.

    Raises:
        RequestError: too little text, a tap out of range, a draft vocabulary that covers nothing.
        MismatchError: a head of another target, NaN in hidden states, another run's working directory.
    """
    _check_head(order)
    sets = tap_sets_of(order)
    roles = assign_roles(order.passages, order.plan, head=order.head is not None, seed=order.seed)
    settings = CaptureSettings(
        layers=tuple(sorted({layer for taps in sets for layer in taps})),
        temperature=order.temperature,
        max_tokens=order.plan.max_tokens,
        seed=order.seed,
        slots=order.plan.slots,
        per_shard=order.plan.slots,
    )
    text = order.work / "capture"
    manifest = capture(order.target, roles.predictors, settings, text, lambda d, n: say("capture", d, n))
    return _Run(order, sets, roles, settings, manifest, say).report()


def _check_head(order: Order) -> None:
    info = order.target.info
    if order.head is not None:
        check_match(order.head.config, info)


class _Run:
    """One run over captured text; its stages read each other's results."""

    def __init__(
        self, order: Order, sets: tuple[TapSet, ...], roles: Roles, settings: CaptureSettings,
        manifest: Manifest, say: Say,
    ) -> None:  # fmt: skip
        self.order, self.sets, self.roles = order, sets, roles
        self.settings, self.manifest, self.say = settings, manifest, say
        self.plan, self.target, self.head = order.plan, order.target, order.head
        self.text = order.work / "capture"
        # Outcomes may be of domains that no predictor has.
        self.domains = tuple(dict.fromkeys((*manifest.domains, *(p.domain for p in roles.outcomes))))
        self.stages = order.work / "stages"
        output = target_head(self.target, order.temperature)
        captured = load_captured(self.text, manifest, output)
        say("labels", 0, 1)
        material = prepare(captured, self._embedding(), self.plan, self._draft_ids())
        say("labels", 1, 1)
        self.material: Material = replace(material, briefs=self._briefs(material))

    def _embedding(self) -> Tensor:
        info = self.target.info
        with torch.inference_mode():
            rows = self.target.embed(torch.arange(info.vocab, device=info.device))
        return rows.detach().float().cpu().clone()

    def _draft_ids(self) -> Tensor | None:
        return None if self.head is None else self.head.ids.cpu()

    def _briefs(self, material: Material) -> dict[int, Brief]:
        """The target run on z alone, its states kept between runs."""
        depths, c = self.plan.estimate().depths, material.captured
        path, key = self.stages / "briefs.safetensors", {"text": f"{self.manifest} {depths}"}
        kept = load_tensors(path)
        if kept is not None and kept[1] == key:
            columns = kept[0]
        else:
            before = beginning(self.target, c.ids, c.doc, material.labels, c.head, material.lumping)
            found = finals(
                self.target, c.ids, c.doc, depths, before, lambda d, n: self.say("target on z", d, n)
            )
            columns = {
                f"{k}.{name}": getattr(each, name) for k, each in found.items() for name in ("keys", "states")
            }
            save_tensors(path, columns, key)
        made = {
            k: Finals(columns[f"{k}.keys"], columns[f"{k}.states"]) for k in depths if f"{k}.keys" in columns
        }
        return {k: each.brief(c.head, material.lumping) for k, each in made.items()}

    def report(self) -> Report:
        """All stages in order, the costly ones that are kept between runs first."""
        main = self.sets[0]
        estimates = self._estimates(main)
        if self.head is not None:
            for name in self.plan.shapes:
                self._decode(self.head, name)
            self._estimates(main, small=True)
        values = self._told() | {"floor": self._floor()}
        values |= measure.cells(self.material, main, estimates, self.plan)
        values["bounds"] = measure.bounds(values["cells"])
        values["taps"] = self._ranking()
        values["domains"] = measure.domains(self.material, estimates, self.plan)
        values |= self._checks(main)
        rows: Parts = [({"source": "probe", "depth": k}, columns_of(e.scores)) for k, e in estimates.items()]
        if self.head is None:
            values |= {"claims": without_head(), "prediction": [], "calibration": [], "waterfall": []}
            values["engine"] = {}
        else:
            found, head_rows = self._with_head(self.head, main, estimates)
            values |= found
            rows += [({"source": "head", "depth": k}, columns_of(r.scores)) for k, r in head_rows.items()]
        return Report(values, rows)

    def _told(self) -> Value:
        plan, c = self.plan, self.material.captured
        return {
            "version": VERSION,
            "kind": "plan" if self.head is None else "head",
            "target": {"name": self.target.info.name, "fingerprint": self.target.info.fingerprint},
            "taps_used": name_of(self.sets[0]),
            "temperature": self.order.temperature,
            "seed": self.order.seed,
            "budget": plan.budget,
            "cuts": list(plan.cuts),
            "documents": {"predictors": len(self.roles.predictors), "outcomes": len(self.roles.outcomes)},
            "rows": c.ids.shape[0],
            "symbols": self.material.labels.width,
            "domain_names": list(self.domains),
            "told": dict(self.order.told or {}),
        }

    def _estimates(self, taps: TapSet, *, small: bool = False, ranking: bool = False) -> dict[int, Estimate]:
        kind = "small" if small else "ranking" if ranking else "main"
        path = self.stages / f"estimate-{kind}-{name_of(taps)}.safetensors"
        settings = self.plan.estimate(ranking=ranking, small=small)
        self.say(f"probe {name_of(taps)} ({kind})", 0, 1)
        key = f"{name_of(taps)} {self.material.symbols_key} {self.manifest} {settings}"
        found = measure.estimate(self.material, taps, settings, path, key)
        self.say(f"probe {name_of(taps)} ({kind})", 1, 1)
        return found

    def _ranking(self) -> list[Value]:
        return measure.ranking(
            self.material, {taps: self._estimates(taps, ranking=True) for taps in self.sets}, self.plan
        )

    def _floor(self) -> Value | None:
        floor = load_floor(self.text, self.manifest)
        if not floor.numel():
            return None
        mean = clean(float(floor.mean()))
        return {"tv_mean": mean, "tv_max": clean(float(floor.max())), "rows": floor.shape[0]}

    def _checks(self, main: TapSet) -> Value:
        plan, m = self.plan, self.material
        return {
            "geometry": self._stage("geometry", lambda: landscape.geometry(m, plan)),
            "entropy": self._stage("entropy", lambda: landscape.entropies(m, plan)),
            "cross_check": self._stage("nce", lambda: measure.cross_check(m, main, plan))
            if plan.nce
            else None,
            "permuted": self._stage("permuted", lambda: measure.permuted_control(m, main, plan))
            if plan.nce
            else None,
            "curve": self._stage("curve", lambda: measure.curve(m, main, plan)) if plan.curve else None,
            "noise": self._stage("noise", lambda: measure.noise_curve(m, main, plan))
            if plan.sigmas
            else None,
            "window": self._stage("window", lambda: self._windows(main)) if plan.windows else None,
        }

    def _windows(self, main: TapSet) -> Value:
        texts = list(documents(self.text, self.manifest))
        windows = (*self.plan.windows, longest(texts))
        return measure.window_curve(self.material, windowed(self.target, texts, main), windows, self.plan)

    def _stage(self, name: str, make: Callable[[], Value]) -> Value:
        """A stage whose result is JSON, kept under a key of plan, symbols and text."""
        path = self.stages / f"{name}.json"
        key = f"{name_of(self.sets[0])} {self.material.symbols_key} {self.manifest} {self.plan}"
        if path.exists():
            try:
                kept = json.loads(path.read_text(encoding="utf-8"))
            except ValueError:
                kept = {}
            if kept.get("key") == key:
                found: Value = kept["value"]
                return found
        self.say(name, 0, 1)
        made = make()
        write_text(path, json.dumps({"key": key, "value": made}))
        self.say(name, 1, 1)
        return made

    def _with_head(
        self, head: DraftHead, main: TapSet, estimates: Mapping[int, Estimate]
    ) -> tuple[Value, dict[int, DraftRows]]:
        rows = self._score_head(head)
        c = self.material.captured
        aligned = align(rows, c.domain)
        measured = {name: self._decode(head, name) for name in self.plan.shapes}
        shapes = self._tree_shapes(head)
        tau = predicted_tau(aligned, self.plan, shapes)
        evidence = Evidence(
            estimates, rows, aligned, c.domain, self.domains, measured, tau, shapes, self.plan
        )
        small = self._estimates(main, small=True)
        found: Value = dict(judge(evidence))
        found["waterfall"] = waterfall(estimates, small, rows, self.plan)
        found["engine"] = {name: engine_row(run, tau[name], self.domains) for name, run in measured.items()}
        found["selection"] = selection(aligned, self.plan)
        found["feature_error"] = landscape.feature_errors(rows, c.head, self.plan)
        return found, rows

    def _score_head(self, head: DraftHead) -> dict[int, DraftRows]:
        c = self.material.captured
        columns = tuple(c.layers.index(layer) for layer in head.config.taps)
        settings = ReadSettings(columns, self.plan.draft_depth, self.material.lumping)
        reader = HeadReader(head, self.target.embed, c.head, settings)
        chosen = self._scored()
        first, parts, total = 0, [], len(self.roles.predictors)
        for number, document in enumerate(documents(self.text, self.manifest)):
            if document.doc in chosen:
                parts.append(reader.read(document, first))
            first += document.ids.shape[0] - document.start
            self.say("head", number + 1, total)
        return gather(parts)

    def _scored(self) -> set[int]:
        """Whole documents, so that the engine's rounds can be followed, of every domain alike: about `head_rows`."""
        c = self.material.captured
        share = self.plan.head_rows / c.ids.shape[0]
        found = torch.unique(c.doc) if share >= 1 else split_roles(c.doc, outcome=share, domain=c.domain)[1]
        return set(found.tolist())

    def _numbered(self) -> list[tuple[int, int, Passage]]:
        """Outcome passages with numbers that no captured document has."""
        first = len(self.roles.predictors)
        return [(first + i, self.domains.index(p.domain), p) for i, p in enumerate(self.roles.outcomes)]

    def _decode(self, head: DraftHead, name: str) -> Measured:
        path = self.stages / f"decoded-{name.replace(' ', '-')}.safetensors"
        asked = f"{self.manifest} {digest(self.roles.outcomes)}"
        key = f"{asked} {self.plan.shapes[name]} {head.config} {_weights_key(head)}"
        kept = load_tensors(path)
        if kept is not None and kept[1].get("key") == key:
            return Measured(**kept[0])
        found, _ = decode(
            self.target,
            head,
            self._numbered(),
            self.plan.shapes[name],
            self.settings,
            lambda d, n: self.say(f"decode {name}", d, n),
        )
        save_tensors(path, found.tensors(), {"key": key})
        return found

    def _tree_shapes(self, head: DraftHead) -> tuple[TreeShape, ...]:
        """Trees drafted on a few predictor documents."""
        if "tree" not in self.plan.shapes:
            return ()
        some = [(i, 0, p) for i, p in enumerate(self.roles.predictors[: self.plan.shape_documents])]
        short = replace(self.settings, max_tokens=min(64, self.settings.max_tokens))
        return decode(self.target, head, some, self.plan.shapes["tree"], short)[1].shapes


def _weights_key(head: DraftHead) -> str:
    return f"{sum(float(p.float().sum()) for p in head.parameters() if p.numel()):.9g} {int(head.ids.sum())}"
