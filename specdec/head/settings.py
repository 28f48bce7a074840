"""What a head's config.json says, read into a HeadConfig: every default spelled out, nothing guessed.

Both layouts are understood; where engines disagree about a missing key this file follows vLLM and says so. It
does not look at tensors.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

from specdec.errors import CheckpointError, MismatchError, SpecdecError, UnsupportedError
from specdec.head.config import HeadConfig, default_taps
from specdec.head.layout import Layout
from specdec.layers.rope import frequencies

IDS = "eagle_aux_hidden_state_layer_ids"
NESTED = "eagle_config"
OWN = "specdec"  # our block in config.json: fingerprint of the target, version
FAMILIES = ("llama", "mistral")
SCALINGS = {  # the numbers that each needs
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}
SWITCHES = ("norm_before_residual", "norm_before_fc", "fc_norm", "norm_output")


def head_config(
    config: Mapping[str, Any],
    layout: Layout,
    taps: tuple[int, ...] | None = None,
    target_layers: int | None = None,
) -> HeadConfig:
    """The HeadConfig a config.json describes.

    Args:
        config: the file's content.
        layout: "raw" or "speculators".
        taps: layer-input ids given by the user; must agree with the file's, needed where it has none.
        target_layers: of the target, to check the ids against.

    Raises:
        CheckpointError: a key is missing or has the wrong kind of value.
        MismatchError: no tap ids, or ids that contradict each other or lie beyond the target.
        UnsupportedError: a layer this build does not compute.
    """
    layer = config if layout == "raw" else _mapping(config, "transformer_layer_config")
    _refuse_other_layers(layer)
    theta, scaling = rope_of(layer)
    hidden, heads = _number(layer, "hidden_size"), _number(layer, "num_attention_heads")
    vocab = _number(layer, "vocab_size")
    found = resolve_taps(config, taps, target_layers)
    try:
        return HeadConfig(
            hidden=hidden,
            target_hidden=_number(config, "target_hidden_size", hidden),
            taps=found,
            intermediate=_number(layer, "intermediate_size"),
            heads=heads,
            kv_heads=_number(layer, "num_key_value_heads", heads),
            head_dim=_number(layer, "head_dim", hidden // heads),
            vocab=vocab,
            draft_vocab=_number(config, "draft_vocab_size", vocab),
            eps=_real(layer, "rms_norm_eps", 1e-6),  # LlamaConfig's default
            theta=theta,
            scaling=scaling,
            max_length=_number(layer, "max_position_embeddings", 2048),
            window=_window(layer),
            fingerprint=own(config, "fingerprint"),
            **switches(config, layout),
        )
    except (CheckpointError, UnsupportedError):
        raise
    except SpecdecError as error:
        raise CheckpointError(
            error.message,
            field=f"config.json: {error.field}",
            value=error.value,
            allowed=error.allowed,
            remedy=error.remedy,
        ) from error


def switches(config: Mapping[str, Any], layout: Layout) -> dict[str, bool]:
    """The four norm switches. A missing norm_before_residual means True in speculators files, False in raw
    ones."""
    nested = _block(config, NESTED)
    absent = {"norm_before_residual": layout == "speculators"}
    found = {name: config.get(name, nested.get(name, absent.get(name, False))) for name in SWITCHES}
    for name, value in found.items():
        if not isinstance(value, bool):
            raise CheckpointError("must be true or false", field=f"config.json: {name}", value=value)
    return found


def own(config: Mapping[str, Any], key: str) -> str | None:
    """A word of our own block, None where there is none. Raises CheckpointError."""
    value = _block(config, OWN).get(key)
    if value is not None and not isinstance(value, str):
        raise CheckpointError("must be text", field=f"config.json: {OWN}.{key}", value=value)
    return value


def resolve_taps(
    config: Mapping[str, Any], given: tuple[int, ...] | None, target_layers: int | None
) -> tuple[int, ...]:
    """Tap ids (layer-input convention) from the file or the user; all sources must agree.

    Top-level ids are layer inputs (vLLM, llama.cpp); those nested in eagle_config are layer outputs (SGLang),
    that is one less.

    >>> resolve_taps({"eagle_config": {"eagle_aux_hidden_state_layer_ids": [1, 15, 28]}}, None, 32)
    (2, 16, 29)
    """
    sources = declared_taps(config)
    if given is not None:
        sources["taps"] = tuple(sorted(given))
    if not sources:
        raise MismatchError(
            "the head does not say which layers it reads", field="taps", remedy=_suggestion(target_layers)
        )
    if len(set(sources.values())) > 1:
        told = ", ".join(f"{name} means {list(ids)}" for name, ids in sources.items())
        raise MismatchError(
            f"sources disagree about the layers the head reads: {told} (as layer inputs)",
            field="taps",
            remedy="Correct config.json: nested ids are one less.",
        )
    found = next(iter(sources.values()))
    if target_layers is not None and found and found[-1] > target_layers:
        raise MismatchError(
            "a tap lies beyond the target's last layer",
            field="taps",
            value=list(found),
            allowed=f"0..{target_layers}",
            remedy="This head was made for a deeper target.",
        )
    return found


def declared_taps(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Every statement of tap ids in a config.json, as rising layer-input ids, by where it stands."""
    nested = _block(config, NESTED)
    found: dict[str, tuple[int, ...]] = {}
    for name, ids, shift in (
        (IDS, config.get(IDS), 0),
        (f"{NESTED}.{IDS}", nested.get(IDS), 1),
        (f"{NESTED}.layer_ids", nested.get("layer_ids"), 0),  # vLLM's V2 runner
    ):
        if ids is None:
            continue
        if not isinstance(ids, list) or not all(isinstance(i, int) for i in ids):
            raise CheckpointError("must be a list of whole numbers", field=f"config.json: {name}", value=ids)
        found[name] = tuple(sorted(i + shift for i in ids))  # engines record features in rising layer order
    return found


def rope_of(layer: Mapping[str, Any]) -> tuple[float, dict[str, Any] | None]:
    """Rotary base and scaling. Without a base it is 10000, as in the official releases, never the target's.

    Raises:
        UnsupportedError: a scaling this build does not compute.
        CheckpointError: two bases, or a scaling block that lacks a number or has another kind of value.
    """
    block = dict(_block(layer, "rope_parameters") or _block(layer, "rope_scaling"))
    bases = {
        _real(place, "rope_theta", 0.0) for place in (layer, block) if place.get("rope_theta") is not None
    }
    block.pop("rope_theta", None)
    if len(bases) > 1:
        raise CheckpointError(
            "two different rotary bases", field="config.json: rope_theta", value=sorted(bases)
        )
    theta = bases.pop() if bases else 10000.0
    scaling = block if block.get("rope_type", block.get("type", "default")) != "default" else None
    if scaling is not None:
        _check_scaling(scaling)
    return theta, scaling


def _check_scaling(scaling: Mapping[str, Any]) -> None:
    kind = str(scaling.get("rope_type", scaling.get("type")))
    for key in SCALINGS.get(kind, ()):
        value: Any = scaling.get(key)
        if not _is_number(value) or value <= 0:
            raise CheckpointError(
                "must be a positive number", field=f"config.json: rope_scaling.{key}", value=value
            )
    if kind == "llama3" and scaling["low_freq_factor"] >= scaling["high_freq_factor"]:
        raise CheckpointError("must be below high_freq_factor", field="config.json: rope_scaling.low_freq_factor",
                              value=scaling["low_freq_factor"])  # fmt: skip
    frequencies(2, 1.0, scaling)  # refuses the kinds it does not know


def _suggestion(layers: int | None) -> str:
    text = "Pass --taps with layer-input ids (see where the head was published)"
    if layers is None:
        return text + "."
    try:
        return (
            text
            + f"; EAGLE-3's own choice for {layers} layers is {','.join(map(str, default_taps(layers)))}."
        )
    except SpecdecError:
        return text + "."


def _refuse_other_layers(layer: Mapping[str, Any]) -> None:
    family, act = layer.get("model_type", "llama"), layer.get("hidden_act", "silu")
    if family not in FAMILIES:
        raise UnsupportedError(
            "not a head this build computes",
            field="config.json: model_type",
            value=family,
            allowed=", ".join(FAMILIES),
        )
    if act != "silu":
        raise UnsupportedError(
            "not an activation this build computes",
            field="config.json: hidden_act",
            value=act,
            allowed="silu",
        )


def _window(layer: Mapping[str, Any]) -> int | None:
    """A window counts where layer_types declares it, as in vLLM; Llama files carry stray `sliding_window`
    keys."""
    kinds = layer.get("layer_types") or []
    if not isinstance(kinds, list):
        raise CheckpointError("must be a list", field="config.json: layer_types", value=kinds)
    if not kinds or kinds[0] != "sliding_attention":
        return None
    return _number(layer, "sliding_window")


def _mapping(config: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    value = config.get(key)
    if not isinstance(value, Mapping):
        raise CheckpointError("is missing or not an object", field=f"config.json: {key}", value=value)
    return value


def _block(config: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    """An object that may be absent: empty then."""
    return {} if config.get(key) is None else _mapping(config, key)


def _number(config: Mapping[str, Any], key: str, absent: int | None = None) -> int:
    value = config.get(key)
    value = absent if value is None else value
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise CheckpointError("must be a positive whole number", field=f"config.json: {key}", value=value)
    return value


def _real(config: Mapping[str, Any], key: str, absent: float) -> float:
    value = config.get(key, absent)
    if not _is_number(value):
        raise CheckpointError("must be a number", field=f"config.json: {key}", value=value)
    return float(value)


def _is_number(value: Any) -> bool:
    """A finite one: JSON knows none that a float does not hold, Python's reader does."""
    kind = isinstance(value, int | float) and not isinstance(value, bool)
    return kind and abs(value) <= sys.float_info.max
