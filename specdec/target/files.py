"""Where a target's files come from: one door for the embedded default, directories, GGUF files and Hub ids.

`resolve` turns a name into a directory of config, weights and tokenizer; the other functions read from it.
Knows nothing of architectures: what the tensors mean is weights.py's and adapter.py's business.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from specdec.errors import CheckpointError, SpecdecError
from specdec.places import cache_root
from specdec.target import embedded, gguf, store, weights
from specdec.target.shards import PICKLED, SAFETENSORS, first_line, read_shard, shards

CONFIG, GENERATION = "config.json", "generation_config.json"
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
VOCABULARIES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "tekken.json")
NEEDED = "Put tokenizer.json and tokenizer_config.json there."
HUB_FILES = ("*.json", "*.jinja", "*.model", "*.txt")
HUB_TWINS = ("*/*", "consolidated*.safetensors")
"""Other formats of the same weights: folders of a repository, and Mistral's own beside transformers'."""
DOORS = f"{embedded.NAME}, a directory, a .gguf file, or a Hub id such as org/model"


@dataclass(frozen=True, slots=True)
class TargetFiles:
    """A target on disk.

    Args:
        name: as the user gave it.
        directory: holds config.json, weights and tokenizer files.
    """

    name: str
    directory: Path


def resolve(name: str, *, cache_dir: Path | None = None) -> TargetFiles:
    """Find a target, converting or fetching it on first use.

    Args:
        name: the embedded default's name; else an existing directory or .gguf file; else a Hub id. A
            directory that happens to be called as the default is reached by "./smollm2-135m".
        cache_dir: where conversions are kept; by default `places.cache_root()`. The Hub keeps its own cache.

    Raises:
        SpecdecError: no such target; the remedy says what to do.
        CheckpointError: its files are incomplete or broken.
    """
    root = cache_root() if cache_dir is None else cache_dir
    if name == embedded.NAME:
        return _converted(name, embedded.SHA256, root)
    path = Path(name).expanduser()
    if path.is_file():
        return _from_file(name, path, root)
    if name and path.is_dir():  # Path("") is the current directory
        return _from_directory(name, path, root)
    if not HUB_ID.fullmatch(name) or path.suffix == ".gguf" or name.startswith("."):
        raise SpecdecError("no such target", field="target", value=name, allowed=DOORS)
    return _from_hub(name)


def _from_file(name: str, path: Path, root: Path) -> TargetFiles:
    if path.suffix.lower() != ".gguf":
        raise SpecdecError("is a file, but not a .gguf file", field="target", value=name, allowed=DOORS)
    return _converted(name, store.sha256_once(path, root / "digests"), root, path)


def _from_directory(name: str, path: Path, root: Path) -> TargetFiles:
    ggufs = sorted(path.glob("*.gguf"))
    if ggufs and not (path / CONFIG).is_file():
        if len(ggufs) > 1:
            raise SpecdecError("holds several .gguf files", field="target", value=name,
                               allowed=", ".join(file.name for file in ggufs), remedy="Name one of them.")  # fmt: skip
        return _from_file(name, ggufs[0], root)
    load_config(path)
    shards(path)
    return TargetFiles(name, path)


def _converted(name: str, sha256: str, root: Path, source: Path | None = None) -> TargetFiles:
    """The cached conversion of a GGUF file; of the embedded default if no `source` is given."""
    stem = embedded.NAME if source is None else source.stem
    label = re.sub(r"[^\w-]+", "-", stem).strip("-") or "model"
    place = root / "targets" / f"{label}-{sha256[:16]}-r{gguf.RECIPE}"
    store.build_once(place, lambda new: gguf.convert(source or embedded.locate(), new, label))
    return TargetFiles(name, place)


def _from_hub(name: str) -> TargetFiles:
    from huggingface_hub import snapshot_download

    def fetch(*patterns: str) -> Path:
        return Path(snapshot_download(name, allow_patterns=list(patterns), ignore_patterns=list(HUB_TWINS)))

    try:
        path = fetch(*HUB_FILES, "*.safetensors")
        if not any(path.glob("*.safetensors")):
            path = fetch(*HUB_FILES, "pytorch_model*.bin")
    except (OSError, ValueError) as error:  # the Hub's errors, from "offline" to "gated", are kinds of these
        offline = "HF_HUB_OFFLINE is set; unset it. " if os.environ.get("HF_HUB_OFFLINE") else ""
        raise SpecdecError(f"no such directory here, and the Hub does not give it: {first_line(error)}",
                           field="target", value=name, allowed=DOORS,
                           remedy=offline + "Check the name, the network and, for a gated model, HF_TOKEN."
                           ) from error  # fmt: skip
    load_config(path)
    shards(path)
    return TargetFiles(name, path)


def load_config(directory: Path) -> dict[str, Any]:
    """config.json.

    Raises:
        CheckpointError: absent, or not a JSON object.
    """
    return _json(directory / CONFIG)


def load_state(directory: Path) -> dict[str, Tensor]:
    """All tensors by name, memory-mapped where the format allows: nothing is read until it is used.

    Raises:
        CheckpointError: naming the file, and the tensor where one is missing or cut off.
    """
    state: dict[str, Tensor] = {}
    for shard in shards(directory):
        tensors = read_shard(directory / shard.name)
        if lacking := sorted(shard.expected - tensors.keys()):
            raise CheckpointError("the index promises a tensor that the file lacks", field=lacking[0],
                                  value=shard.name, remedy="Fetch the weights again.")  # fmt: skip
        state |= tensors
    return state


def check_finite(state: Mapping[str, Tensor]) -> None:
    """Reads every value once.

    Raises:
        CheckpointError: naming the first tensor that holds NaN or an infinity.
    """
    for name, tensor in state.items():
        weights.check_finite(name, tensor)


def load_tokenizer(directory: Path) -> PreTrainedTokenizerBase:
    """The tokenizer, chat template included.

    Raises:
        CheckpointError: its files are absent or broken.
    """
    if not any((directory / name).is_file() for name in VOCABULARIES):
        # transformers makes an empty tokenizer for some families rather than say so
        raise CheckpointError(
            "has no tokenizer files", field="tokenizer", value=str(directory), remedy=NEEDED
        )
    try:
        return AutoTokenizer.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # the tokenizers library raises bare Exception for a broken tokenizer.json
        raise CheckpointError(f"cannot be loaded: {first_line(error)}", field="tokenizer",
                              value=str(directory), remedy=NEEDED) from error  # fmt: skip


def stop_token_ids(directory: Path) -> tuple[int, ...]:
    """Token ids that end an answer: of generation_config.json, else of config.json; () if neither names one.

    Raises:
        CheckpointError: a file is broken, or the entry is neither an id nor a list of ids.
    """
    for path in (directory / GENERATION, directory / CONFIG):
        if path.is_file() and (found := tuple(_stops(path))):
            return found
    return ()


def _stops(path: Path) -> Iterator[int]:
    document = _json(path)
    text = document.get("text_config")
    eos = document.get("eos_token_id", text.get("eos_token_id") if isinstance(text, dict) else None)
    for token in eos if isinstance(eos, list) else [] if eos is None else [eos]:
        if not isinstance(token, int) or isinstance(token, bool) or token < 0:
            raise CheckpointError("is no token id", field=f"{path.name}: eos_token_id", value=eos,
                                  allowed="an id or a list of ids")  # fmt: skip
        yield token


def _number(value: dict[str, Any]) -> Any:
    """Infinities as transformers writes them, since JSON has none."""
    return float(value["__float__"]) if value.keys() == {"__float__"} else value


def _json(path: Path) -> dict[str, Any]:
    try:
        document = json.loads(path.read_text(encoding="utf-8"), object_hook=_number)
    except FileNotFoundError:
        raise CheckpointError(f"no {path.name} in it", field="target", value=str(path.parent),
                              remedy=f"A target is a directory of {path.name}, {SAFETENSORS} (or {PICKLED}) "
                              "and tokenizer files.") from None  # fmt: skip
    except (OSError, ValueError) as error:
        raise CheckpointError(f"cannot be read: {error}", field=str(path)) from error
    if not isinstance(document, dict):
        raise CheckpointError("is not a JSON object", field=str(path), value=document)
    return document
