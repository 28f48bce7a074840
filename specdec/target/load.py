"""The door to targets: a name goes in, a tested target with its tokenizer comes out.

Chooses between the lean decoder and the transformers adapter, and the dtype. Where files come from is
files.py's business. Dimension legend: B requests, N rows, H hidden, A taps, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from specdec.attention.choose import Choice, choose_attention
from specdec.attention.protocol import Rows
from specdec.attention.reference import ReferenceAttention
from specdec.cache import KVCache
from specdec.errors import CheckpointError, UnsupportedError
from specdec.layers.embedding import embedded
from specdec.memory import current, free_bytes, gib, tensor_bytes
from specdec.target.files import (
    TargetFiles,
    load_config,
    load_state,
    load_tokenizer,
    resolve,
    stop_token_ids,
)
from specdec.target.fingerprint import fingerprint
from specdec.target.lean import LeanConfig, LeanDecoder
from specdec.target.precision import fastest_dtype
from specdec.target.protocol import States, Target, TargetInfo
from specdec.target.selftest import self_test
from specdec.target.source import Source
from specdec.target.stated import stated_config
from specdec.target.weights import EMBEDDING, HEAD, assemble, check_names, lean_shapes

Prefer = Literal["auto", "lean", "adapter"]
DtypeChoice = torch.dtype | Literal["auto"] | None
DeviceMap = str | Mapping[str, Any]
Config = Mapping[str, Any]
"""A config.json."""

KINDS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
DTYPES = {str(kind).removeprefix("torch."): kind for kind in KINDS}


class LeanTarget:
    """Our own decoder behind the `Target` protocol. Weights only: caches are arguments."""

    def __init__(self, decoder: LeanDecoder, info: TargetInfo, choice: Choice | None = None) -> None:
        self.decoder, self.info = decoder, info
        self.choice = choice or Choice(decoder.attention)

    def forward(self, tokens: Tensor, rows: Rows, cache: KVCache, taps: tuple[int, ...]) -> States:
        """See `Target.forward`."""
        return self.decoder(tokens, rows, cache, taps)  # type: ignore[no-any-return]  # nn.Module calls return Any

    def logits(self, final: Tensor) -> Tensor:
        """[..., H] -> [..., V], in the target's dtype."""
        return self.decoder.head(final)  # type: ignore[no-any-return]

    def embed(self, tokens: Tensor) -> Tensor:
        """Input embeddings [..., H]."""
        return embedded(tokens, self.decoder.embedding)

    def output_embedding(self) -> Tensor:
        """The LM head's matrix, a float32 copy [V, H]; unpacked on the fly, so that it is not held twice."""
        return output_matrix(self.decoder).to(torch.float32, copy=True)

    def final_norm(self) -> tuple[Tensor, float]:
        """Weight [H] and eps of the norm before the LM head."""
        return self.decoder.norm.weight, self.decoder.norm.eps


def output_matrix(decoder: LeanDecoder) -> Tensor:
    """The LM head's matrix [V, H]: the embedding when tied, else unpacked for the occasion."""
    if decoder.config.tied:
        return decoder.embedding.detach()
    return decoder.head.plain_weight()


@dataclass(frozen=True, slots=True)
class LoadedTarget:
    """A target that passed its self-test, and what came with it."""

    target: Target
    tokenizer: PreTrainedTokenizerBase
    files: TargetFiles


def load_target(name: str, *, dtype: DtypeChoice = None, device: str | torch.device = "cpu",
                prefer: Prefer = "auto", device_map: DeviceMap | None = None) -> LoadedTarget:  # fmt: skip
    """Find, load, check and test a target.

    Args:
        name: what `resolve` takes: the embedded default's name, a directory, a GGUF file, a Hub id.
        dtype: of the weights; "auto" takes the config's; None takes the config's on a GPU and what a short
            measurement finds fastest on a CPU (float32 or bfloat16).
        device: where it runs, such as "cpu" or "cuda:0".
        prefer: "lean" or "adapter" to insist on one; "auto" takes the lean decoder where it fits.
        device_map: accelerate's placement over several devices; the adapter then does the work.

    Raises:
        SpecdecError: not to be found; CheckpointError for missing, unexpected, mis-shaped or NaN tensors;
            UnsupportedError naming the architecture and what it lacks, or a device that cannot be used here.
    """
    _check_device(device, "device")
    files = resolve(name)
    config = load_config(files.directory)
    stated_config(config)  # before the tokenizer's loader, which reads it too and would be blamed
    tokenizer = load_tokenizer(files.directory)  # before the weights, so that a lack of it is told in seconds
    for module, place in device_map.items() if isinstance(device_map, Mapping) else ():
        _check_device("cpu" if place == "disk" else place, f"device_map[{module!r}]")
    kind = _dtype(dtype, config, torch.device(device))
    with current(torch.device(device)):
        target = load_weights(files, kind, {"": device} if device_map is None else device_map, prefer)
    eos = tokenizer.eos_token_id
    if not target.info.stop_ids and eos is not None:  # no config names one: better than an answer without end
        target.info = replace(target.info, stop_ids=(eos,))
    return LoadedTarget(target, tokenizer, files)


def load_weights(
    files: TargetFiles, dtype: torch.dtype, placement: DeviceMap, prefer: Prefer = "auto"
) -> Target:
    """`load_target` without names, choices and tokenizer.

    Args:
        placement: {"": device}, or accelerate's over several devices.
    """
    config = load_config(files.directory)
    if isinstance(placement, Mapping) and set(placement) == {""} and not config.get("quantization_config"):
        # accelerate plans for several devices by itself
        check_room(files, dtype, torch.device(placement[""]))
    return _lean(files, config, dtype, placement, prefer) or _adapter(files, dtype, placement)


def _check_device(place: Any, field: str) -> None:
    """Raises UnsupportedError for a device that this machine does not have."""
    try:
        torch.empty(0, device=place)
    except (RuntimeError, AssertionError, TypeError) as error:
        told = str(error).splitlines()[0]
        raise UnsupportedError(f"cannot be used here: {told}", field=field, value=place) from None


def check_room(files: TargetFiles, dtype: torch.dtype, device: torch.device, free: int | None = None) -> None:
    """Before minutes of loading: do the weights fit at all?

    Args:
        free: bytes; None asks the device.

    Raises:
        UnsupportedError: they do not.
    """
    free = free_bytes(device) if free is None else free
    floats = [tuple(t.shape) for t in load_state(files.directory).values() if t.is_floating_point()]
    needed = tensor_bytes(floats, dtype)
    if free is not None and needed > free:
        raise UnsupportedError(
            f"is too small for this target: needs {gib(needed)} for weights in {str(dtype).removeprefix('torch.')}, "
            f"{gib(free)} are free", field="device", value=str(device),
            remedy="Take a smaller dtype or target, or spread it with device_map=\"auto\".",
        )  # fmt: skip


def _adapter(files: TargetFiles, dtype: torch.dtype, placement: DeviceMap) -> Target:
    # here, because transformers' models take seconds and 150 MB to import, and the lean decoder needs none
    from specdec.target.adapter import load_adapter

    stops = tuple(stop_token_ids(files.directory))
    target = load_adapter(files.name, files.directory, stops, dtype, placement)
    self_test(target)
    return target


def _lean(files: TargetFiles, config: Config, dtype: torch.dtype, placement: DeviceMap,
          prefer: Prefer) -> Target | None:  # fmt: skip
    """The lean target where it fits and passes its self-test; None leaves the matter to the adapter."""
    if prefer == "adapter":
        return None
    try:
        device = _one_device(placement)
        target = _load_lean(files, config, dtype, device)
        self_test(target)
    except UnsupportedError:
        if prefer == "lean":
            raise
        return None
    return target


def _one_device(placement: DeviceMap) -> torch.device:
    if isinstance(placement, str) or set(placement) != {""}:
        raise UnsupportedError("the lean decoder lives on one device", field="device_map", value=placement)
    return torch.device(placement[""])


def _load_lean(files: TargetFiles, config: Config, dtype: torch.dtype, device: torch.device) -> LeanTarget:
    if config.get("quantization_config"):
        raise UnsupportedError("the lean decoder runs plain weights", field="quantization_config",
                               value=config["quantization_config"])  # fmt: skip
    sizes = LeanConfig.read(config)
    source = Source(files.directory)
    check_names(source.shapes, sizes)
    sizes = _as_stored(sizes, source)
    decoder = assemble(sizes, source.take, ReferenceAttention(), dtype, device)
    choice = choose_attention(decoder.cache_shape(), sizes.heads, sorted(set(sizes.windows), key=str))
    decoder.attention = choice.attention
    return LeanTarget(decoder, _info(files, config, sizes, decoder), choice)


def _as_stored(sizes: LeanConfig, source: Source) -> LeanConfig:
    """Who went on training may have left an LM head of its own beside a config that still says tied: transformers takes
    it then, and so do we."""
    if not sizes.tied or HEAD not in source.shapes:
        return sizes
    return replace(sizes, tied=torch.equal(source.peek(EMBEDDING), source.peek(HEAD)))


def _info(files: TargetFiles, config: Config, sizes: LeanConfig, decoder: LeanDecoder) -> TargetInfo:
    return TargetInfo(
        name=files.name,
        architecture=_architecture(config),
        vocab=sizes.vocab,
        hidden=sizes.hidden,
        layers=sizes.layers,
        max_length=sizes.max_length,
        stop_ids=tuple(stop_token_ids(files.directory)),
        dtype=decoder.embedding.dtype,
        device=decoder.embedding.device,
        fingerprint=fingerprint(output_matrix(decoder), sizes.layers),
        cache=decoder.cache_shape(),
        weight_bytes=tensor_bytes(lean_shapes(sizes), decoder.embedding.dtype),
    )


def _architecture(config: Config) -> str:
    named = config.get("architectures") or [config.get("model_type", "unknown")]
    return str(named[0])


def _dtype(asked: DtypeChoice, config: Config, device: torch.device) -> torch.dtype:
    if isinstance(asked, torch.dtype):
        return asked
    if asked is None and device.type == "cpu":
        return fastest_dtype(_block_shapes(config))
    text = str(config.get("dtype") or config.get("torch_dtype") or "float32")
    if text not in DTYPES:
        raise CheckpointError("unknown dtype", field="dtype in config.json", value=text,
                              allowed=", ".join(DTYPES))  # fmt: skip
    return DTYPES[text]


def _block_shapes(config: Config) -> tuple[tuple[int, int], ...]:
    """Projections of one block; for families the lean decoder does not know, of a Llama of the same width."""
    try:
        c = LeanConfig.read(config)
    except UnsupportedError:
        hidden = int(config.get("hidden_size") or config.get("n_embd") or 1024)
        return ((3 * hidden, hidden), (hidden, hidden), (8 * hidden, hidden), (hidden, 4 * hidden))
    q, kv = c.heads * c.head_dim, c.kv_heads * c.head_dim
    return ((q + 2 * kv, c.hidden), (c.hidden, q), (2 * c.intermediate, c.hidden), (c.hidden, c.intermediate))
