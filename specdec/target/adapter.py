"""HFTarget: any transformers causal LM as a target, through its attention interface and a cache of our own.

Slower per layer than the lean decoder, but general, and the oracle that tests it. Nothing about a family is
taken on trust: sizes are probed, logits are compared with the model's own at load, trees by the self-test.
Dimension legend: B requests, N rows, H hidden, A taps, V vocabulary.

A target spread over several devices keeps its rows on one, with the last layer: others send theirs there to attend.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, PreTrainedModel

from specdec.attention.protocol import Rows, chunk_rows
from specdec.attention.reference import ReferenceAttention
from specdec.cache import CacheShape, KVCache
from specdec.errors import CheckpointError, SpecdecError, UnsupportedError
from specdec.target import anatomy, bridge
from specdec.target.fingerprint import fingerprint
from specdec.target.protocol import States, TargetInfo
from specdec.target.selftest import TOLERANCE
from specdec.target.shards import first_line
from specdec.target.weights import check_finite

Report = Mapping[str, Any]
"""What transformers says about a load: names by kind of trouble."""

WRONG = {"missing_keys": "lacks", "unexpected_keys": "has unexpected", "mismatched_keys": "has mis-shaped"}
CHECKED_ROWS = 10  # tokens of the forward that is compared with the model's own


@dataclass(frozen=True, slots=True)
class Parts:
    """The modules of a transformers model that the adapter touches."""

    base: nn.Module
    layers: nn.ModuleList
    embedding: Tensor
    head: nn.Module


class HFTarget:
    """A transformers model behind the `Target` protocol.

    Args:
        model: in evaluation mode, with our attention set; see `adapt`, which makes one safely.
        info: its facts.
        readout: what the family does to its logits.
    """

    def __init__(self, model: PreTrainedModel, info: TargetInfo, readout: anatomy.Readout) -> None:
        self.model, self.info, self.readout = model, info, readout
        self.attention = ReferenceAttention()
        self._parts = parts_of(model)
        # stateless: rows live in the engine's cache
        self._cache = {bridge.cache_argument(self._parts.base): bridge.spec_cache(info.layers)}

    def forward(self, tokens: Tensor, rows: Rows, cache: KVCache, taps: tuple[int, ...]) -> States:
        """See `Target.forward`."""
        tapped: dict[int, Tensor] = {}
        running = bridge.Pass(rows, cache, self.attention)
        # drafts may stand past the last position: they are never emitted, but learned positions have no row there
        positions = rows.positions.clamp(max=self.info.max_length - 1)
        with bridge.flying(running), _tapping(self._parts.layers, taps, tapped):
            final = self._parts.base(
                input_ids=tokens, position_ids=positions, use_cache=True, **self._cache
            ).last_hidden_state.to(self.info.device)
        if any(states.dim() != final.dim() for states in tapped.values()):
            raise UnsupportedError("passes on several streams between layers (as Gemma 3n), which no head can read",
                                   field=self.info.architecture, remedy="Draft with ngram.")  # fmt: skip
        features = torch.cat([tapped[k].to(final.device) for k in taps], dim=-1) if taps else final[..., :0]
        return States(final, features)

    def logits(self, final: Tensor) -> Tensor:
        """[..., H] -> [..., V], soft caps and scales of the family applied."""
        return self.readout(self._parts.head(final)).to(self.info.device)

    def embed(self, tokens: Tensor) -> Tensor:
        """Input embeddings [..., H], before any scaling."""
        weight = self._parts.embedding
        return F.embedding(tokens.to(weight.device), weight).to(self.info.device)

    def output_embedding(self) -> Tensor:
        """The LM head's matrix, a float32 copy [V, H], with the scale that the family gives its logits."""
        weight = self._parts.head.weight
        assert isinstance(weight, Tensor)
        return self.readout.scaled(weight.detach().to(torch.float32, copy=True))

    def finishing(self, ids: Tensor) -> Callable[[Tensor], Tensor]:
        """What makes logits of products with the rows `ids` of `output_embedding`: the LM head's bias, the soft cap."""
        bias = getattr(self._parts.head, "bias", None)
        added = None if bias is None else self.readout.scaled(bias.detach().float()[ids.to(bias.device)])

        def finish(products: Tensor) -> Tensor:
            return self.readout.bent(products if added is None else products + added.to(products.device))

        return finish

    def final_norm(self) -> tuple[Tensor, float]:
        """Weight [H] and eps of the norm before the LM head."""
        weight, eps = anatomy.final_norm(self.model)
        return weight.to(self.info.device), eps


def parts_of(model: PreTrainedModel) -> Parts:
    """Raises UnsupportedError for a model without a list of layers or an LM head."""
    _, layers = anatomy.decoder_layers(model)
    head = model.get_output_embeddings()  # type: ignore[no-untyped-call]  # transformers
    embedding = model.get_input_embeddings().weight
    if head is None or not isinstance(embedding, Tensor):
        raise UnsupportedError("has no LM head or token embedding", field=anatomy.architecture(model))
    away = {
        "token embedding": embedding,
        "LM head": head.weight,
        "final norm": anatomy.final_norm_weight(model),
    }
    if offloaded := [name for name, weight in away.items() if isinstance(weight, Tensor) and weight.is_meta]:
        raise UnsupportedError(
            f"leaves the {' and the '.join(offloaded)} without a device: only decoder layers may be offloaded",
            field="device_map", remedy="Give a map that keeps them on a device, or take a smaller dtype or target.",
        )  # fmt: skip
    return Parts(model.base_model, layers, embedding, head)


def home(parts: Parts) -> torch.device:
    """Where the engine's tensors live: with the last layer, or with the LM head where that layer is offloaded."""
    last = next((p.device for p in parts.layers[-1].parameters() if not p.is_meta), None)
    weight = parts.head.weight
    assert isinstance(weight, Tensor)
    return weight.device if last is None else last


@contextlib.contextmanager
def _tapping(layers: nn.ModuleList, taps: tuple[int, ...], into: dict[int, Tensor]) -> Iterator[None]:
    """Record the residual stream entering each tapped layer; tap `len(layers)` is what leaves the last."""

    def entering(tap: int) -> Any:
        def record(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            into[tap] = args[0] if args else kwargs["hidden_states"]

        return record

    def leaving(_: nn.Module, __: Any, output: Any) -> None:
        into[len(layers)] = output if isinstance(output, Tensor) else output[0]

    inner = [k for k in taps if k < len(layers)]
    hooks = [layers[k].register_forward_pre_hook(entering(k), with_kwargs=True) for k in inner]
    if len(layers) in taps:
        hooks.append(layers[-1].register_forward_hook(leaving))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def load_adapter(name: str, directory: Path, stop_ids: tuple[int, ...], dtype: torch.dtype,
                 placement: Mapping[str, Any] | str) -> HFTarget:  # fmt: skip
    """Load a directory with transformers and adapt it.

    Args:
        name: for `TargetInfo`.
        directory: config and weights.
        stop_ids: its end-of-sequence tokens.
        dtype: of the weights.
        placement: {"": device}, or a device map of accelerate.

    Raises:
        CheckpointError: for missing, unexpected, mis-shaped or NaN tensors.
        UnsupportedError: see `adapt`.
    """
    whole = placement[""] if isinstance(placement, Mapping) and set(placement) == {""} else None
    model, report = _from_pretrained(directory, dtype, None if whole is not None else placement)
    _check_report(report)
    for tensor_name, tensor in model.named_parameters():
        if not tensor.is_meta:  # offloaded by accelerate
            check_finite(tensor_name, tensor)
    if whole is not None:
        model = model.to(whole)
    return adapt(model, name, stop_ids)


def _from_pretrained(directory: Path, dtype: torch.dtype, device_map: Any) -> tuple[PreTrainedModel, Report]:
    load: Any = AutoModelForCausalLM.from_pretrained  # annotated without the report it returns on request
    try:
        model, report = load(
            directory, dtype=dtype, device_map=device_map, output_loading_info=True, local_files_only=True,
            trust_remote_code=False,  # its default asks the terminal
        )  # fmt: skip
    except (OSError, SafetensorError, RuntimeError, EOFError, UnpicklingError) as error:
        raise CheckpointError(f"transformers cannot load the weights: {error}", field="weights",
                              value=str(directory)) from error  # fmt: skip
    except (ValueError, KeyError, ImportError) as error:  # the last where a quantisation wants a package
        raise UnsupportedError(f"transformers cannot build this model: {first_line(error)}", field="model",
                               value=str(directory)) from error  # fmt: skip
    return model, report


def _check_report(report: Report) -> None:
    for key, wrong in WRONG.items():
        names = sorted(map(str, report.get(key) or ()))
        if names:
            raise CheckpointError(
                f"the checkpoint {wrong} tensors", field="weights", value=", ".join(names[:4]),
                remedy="Is the download complete, and config.json of this model?",
            )  # fmt: skip


@torch.inference_mode()
def adapt(model: PreTrainedModel, name: str, stop_ids: tuple[int, ...] = ()) -> HFTarget:
    """Make a target of a transformers model; it keeps our attention from then on.

    Raises:
        UnsupportedError: naming the architecture and what it lacks, or how far its logits are off.
    """
    anatomy.refuse_known(model)
    model.train(False).requires_grad_(False)
    vocab = int(anatomy.text_config(model).vocab_size)
    tokens = torch.randint(vocab, (1, CHECKED_ROWS), generator=torch.Generator().manual_seed(0))
    tokens = tokens.to(parts_of(model).embedding.device)
    model.set_attn_implementation("eager")  # which applies all that a family asks for: SDPA knows no soft cap
    own = model(input_ids=tokens, use_cache=False).logits.float()
    bridge.register()
    model.set_attn_implementation(bridge.NAME)
    info = _info(model, _probe(model, tokens), name, stop_ids)
    return _matching(model, info, tokens, own)


def _probe(model: PreTrainedModel, tokens: Tensor) -> bridge.Probe:
    """Run once to see what each layer stores and asks for."""
    base, layers = model.base_model, len(parts_of(model).layers)
    architecture = anatomy.architecture(model)
    if "position_ids" not in inspect.signature(base.forward).parameters:
        raise UnsupportedError("cannot verify trees: its forward takes no position_ids", field=architecture)
    probe = bridge.Probe()
    positions = torch.arange(tokens.shape[1], device=tokens.device)[None]
    try:
        with bridge.flying(probe):
            cache = {bridge.cache_argument(base): bridge.spec_cache(layers)}
            base(input_ids=tokens, position_ids=positions, use_cache=True, **cache)
    except SpecdecError as error:
        raise UnsupportedError(f"cannot verify trees: {error}", field=architecture) from error
    except Exception as error:  # whatever a foreign model trips over is a reason to refuse it, by name
        raise UnsupportedError(f"cannot verify trees: its layers do not fit our cache ({error})",
                               field=architecture) from error  # fmt: skip
    _check_probe(probe, model, layers)
    return probe


def _check_probe(probe: bridge.Probe, model: PreTrainedModel, layers: int) -> None:
    architecture = anatomy.architecture(model)
    if not probe.stored or len(probe.calls) != layers:
        raise UnsupportedError(
            "cannot verify trees: some layers bypass the attention interface or the cache of transformers",
            field=architecture, value=f"{len(probe.calls)} of {layers} layers",
        )  # fmt: skip
    slides = anatomy.layer_windows(anatomy.text_config(model), layers)
    if slides is not None and slides != [call.window is not None for call in probe.calls]:
        raise UnsupportedError("cannot verify trees: its layers do not tell attention their sliding window",
                               field=architecture)  # fmt: skip


def _info(model: PreTrainedModel, probe: bridge.Probe, name: str, stop_ids: tuple[int, ...]) -> TargetInfo:
    config, parts = anatomy.text_config(model), parts_of(model)
    weight = parts.head.weight
    assert isinstance(weight, Tensor)
    layers, device = len(parts.layers), home(parts)
    return TargetInfo(
        name=name,
        architecture=anatomy.architecture(model),
        vocab=weight.shape[0],
        hidden=weight.shape[1],
        layers=layers,
        max_length=anatomy.steady_length(config),
        stop_ids=stop_ids,
        dtype=model.dtype,
        device=device,
        fingerprint=fingerprint(weight, layers),
        cache=CacheShape(layers, probe.heads, probe.width, model.dtype, device),
        weight_bytes=sum(p.numel() * p.element_size() for p in model.parameters()),
    )


def _matching(model: PreTrainedModel, info: TargetInfo, tokens: Tensor, own: Tensor) -> HFTarget:
    """The target whose logits are the model's own, trying what its config may ask to be done to them."""
    slot = torch.zeros(1, dtype=torch.int64, device=info.device)
    cache = KVCache(info.cache, 1, tokens.shape[1])
    differences = {}
    for label, readout in anatomy.readouts(anatomy.text_config(model)).items():
        target = HFTarget(model, info, readout)
        final = target.forward(tokens, chunk_rows(slot, slot, tokens.shape[1]), cache, ()).final
        apart = (target.logits(final).float() - own.to(final.device)).abs().max()
        differences[label] = float(apart / own.abs().max().clamp(min=1e-6))
    best = min(differences, key=differences.__getitem__)
    if not differences[best] <= TOLERANCE.get(info.dtype, TOLERANCE[torch.float32]):
        raise UnsupportedError(
            "cannot verify trees: through our attention its logits differ from its own",
            field=info.architecture, value=f"relative difference {differences[best]:.2g} ({best})",
        )  # fmt: skip
    return HFTarget(model, info, anatomy.readouts(anatomy.text_config(model))[best])
