"""Which engines can load a head as it lies on disk, and why not, by what their loaders read.

Sources: vLLM 0.32, SGLang 0.5.23, llama.cpp of mid 2026, SafeAILab/EAGLE of February 2026, speculators 0.9.
An engine that would load a head and compute something else in silence counts as unable. Most of this
was learnt by reading those loaders, not by running them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from specdec.errors import SpecdecError
from specdec.head.config import HeadConfig, default_taps
from specdec.head.files import HeadFiles, read_files
from specdec.head.layout import EMBEDDING
from specdec.head.settings import IDS, NESTED, declared_taps, head_config


@dataclass(frozen=True, slots=True)
class Loadability:
    """One engine's verdict.

    Attributes:
        engine: its name.
        ok: loads the head and computes what was trained.
        reasons: why not; or, where ok, what to mind.
        reads_layout: the layout on disk is one it reads at all; where not, exporting helps.
    """

    engine: str
    ok: bool
    reasons: tuple[str, ...] = ()
    reads_layout: bool = True

    def told(self) -> str:
        """The verdict in words.

        >>> Loadability("vLLM", True, ('pass "method": "eagle3"',)).told()
        'yes (mind: pass "method": "eagle3")'
        """
        why = "; ".join(self.reasons)
        if not self.ok:
            return f"no: {why}"
        return f"yes (mind: {why})" if why else "yes"


@dataclass(frozen=True, slots=True)
class _Head:
    files: HeadFiles
    config: HeadConfig
    layers: int | None

    @property
    def is_raw(self) -> bool:
        return self.files.layout == "raw"

    def on(self, *names: str) -> list[str]:
        """The switches among `names` that are set."""
        return [name for name in names if getattr(self.config, name)]

    def default_for(self) -> tuple[int, ...] | None:
        """EAGLE-3's taps for this target, None when they do not exist or the depth is unknown."""
        try:
            return default_taps(self.layers) if self.layers is not None else None
        except SpecdecError:
            return None


def check(
    path: Path | str, *, taps: tuple[int, ...] | None = None, target_layers: int | None = None
) -> list[Loadability]:
    """A verdict per engine on the head in a directory.

    Args:
        path: raw EAGLE-3 or speculators directory.
        taps: layer-input ids, for files that do not name them.
        target_layers: of the target; decides whether an engine's default taps are the right ones.

    Raises:
        CheckpointError, MismatchError, UnsupportedError: the directory cannot be understood.
    """
    files = read_files(Path(path))
    head = _Head(files, head_config(files.config, files.layout, taps, target_layers), target_layers)
    return [rule(head) for rule in _RULES]


def _verdict(engine: str, against: list[str], mind: list[str] | None = None) -> Loadability:
    return Loadability(engine, not against, tuple(against or mind or ()))


def _other_layout(engine: str, which: str) -> Loadability:
    return Loadability(engine, ok=False, reasons=(which,), reads_layout=False)


def _vllm(head: _Head, engine: str, read: tuple[str, ...]) -> Loadability:
    """`read`: the places of layer ids the runner looks at, in its order, all taken as layer inputs."""
    against = _ids(head, read, shift=0)
    if len(head.config.taps) != 3 and not head.config.fc_norm:
        against.append(f"fc is built for 3 taps, the head has {len(head.config.taps)}")
    mind = ['pass "method": "eagle3"']
    if EMBEDDING in head.files.tensors:
        mind.append("uses the file's own embed_tokens where they differ from the target's")
    return _verdict(engine, against, mind)


def _vllm_v1(head: _Head) -> Loadability:
    return _vllm(head, "vLLM (V1 runner)", (IDS, f"{NESTED}.{IDS}"))


def _vllm_v2(head: _Head) -> Loadability:
    return _vllm(head, "vLLM (V2 runner)", (IDS, f"{NESTED}.layer_ids"))


def _sglang(head: _Head) -> Loadability:
    config = head.files.config
    if not head.is_raw:
        return _other_layout("SGLang", "reads the raw layout only; specdec export --format raw writes it")
    against = _ids(head, (f"{NESTED}.{IDS}",), shift=1)
    if head.config.norm_before_residual:
        against.append("does not know norm_before_residual and would run without it, in silence")
    if head.config.window is not None:
        against.append("gives the draft layer no sliding window")
    if config.get("draft_vocab_size") is None:
        against.append("needs draft_vocab_size in config.json, else it drafts with the target's LM head")
    if config.get("tie_word_embeddings"):
        against.append("tie_word_embeddings makes it ignore the head's lm_head")
    mind = [
        "refuses a head shorter than its context (max_position_embeddings "
        f"{head.config.max_length}) unless SGLANG_ALLOW_OVERWRITE_LONGER_CONTEXT_LEN=1"
    ]
    return _verdict("SGLang", against, mind)


def _llama_cpp(head: _Head) -> Loadability:
    config = head.files.config
    against = _ids(head, (IDS,), shift=0)
    against += [f"does not compute {name}" for name in head.on("fc_norm", "norm_output")]
    if len(head.config.taps) != 3:
        against.append(f"takes exactly 3 taps, the head has {len(head.config.taps)}")
    if head.config.window is not None:
        against.append("gives the draft layer no sliding window")
    if config.get("draft_vocab_size") is None:
        against.append("knows an EAGLE-3 head by draft_vocab_size, which config.json lacks")
    if head.config.norm_before_residual and "norm_before_residual" not in config:
        against.append("takes a missing norm_before_residual for false; this layout means true")
    return _verdict("llama.cpp", against, ["convert with convert_hf_to_gguf.py --target-model-dir"])


def _eagle(head: _Head) -> Loadability:
    if not head.is_raw:
        return _other_layout("EAGLE (SafeAILab)", "reads the raw layout only")
    config = head.config
    against = [
        f"does not compute {name}"
        for name in head.on("norm_before_residual", "norm_before_fc", "fc_norm", "norm_output")
    ]
    expected = head.default_for()
    if len(config.taps) != 3 or (expected is not None and config.taps != expected):
        against.append(f"always reads {_shown(expected)}, the head reads {list(config.taps)}")
    if config.head_dim * config.heads != config.hidden:
        against.append("takes head_dim as hidden / heads")
    kind = (config.scaling or {}).get("rope_type", (config.scaling or {}).get("type"))
    if kind not in (None, "linear"):
        against.append(f"does not compute {kind} rope scaling")
    if config.window is not None:
        against.append("has no sliding window")
    mind = [] if head.layers is not None else [f"always reads {_shown(None)}: check that the taps are these"]
    return _verdict("EAGLE (SafeAILab)", against, mind)


def _speculators(head: _Head) -> Loadability:
    if head.is_raw:
        return _other_layout(
            "speculators", "reads its own layout; specdec export --format speculators writes it"
        )
    against = []
    if len(head.config.taps) != 3 and not head.config.fc_norm:
        against.append(f"fc is built for 3 taps, the head has {len(head.config.taps)}")
    return _verdict("speculators", against + _ids(head, (IDS,), shift=0))


def _ids(head: _Head, read: tuple[str, ...], shift: int) -> list[str]:
    """What is wrong with the ids an engine would use: it takes the first of `read` and adds `shift`."""
    declared = declared_taps(head.files.config)
    for place in read:
        if place in declared:
            means = 1 if place == f"{NESTED}.{IDS}" else 0  # what that place means in our reading
            used = tuple(tap - means + shift for tap in declared[place])
            wrong = used != head.config.taps
            return (
                [f"takes {place} for layers {list(used)}, trained on {list(head.config.taps)}"]
                if wrong
                else []
            )
    expected = head.default_for()
    if expected == head.config.taps:
        return []
    return [
        f"finds no layer ids in {' or '.join(read)} and takes {_shown(expected)} in silence, "
        f"trained on {list(head.config.taps)}"
    ]


def _shown(taps: tuple[int, ...] | None) -> str:
    return str(list(taps)) if taps is not None else "layers 2, n//2, n-3"


_RULES: tuple[Callable[[_Head], Loadability], ...] = (
    _vllm_v1,
    _vllm_v2,
    _sglang,
    _llama_cpp,
    _eagle,
    _speculators,
)
