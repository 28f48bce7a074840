"""From a GGUF file to a directory as everyone writes it: config, float32 safetensors, tokenizer, template.

transformers does the dequantising; this mends what its reader gets wrong. Knows nothing of caches or names.
Float32, because a dequantised 4-bit value is in general no bfloat16: the dtype is chosen at every load.
"""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from contextlib import redirect_stderr, suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import torch
from gguf import MODEL_ARCH_NAMES, GGUFReader, get_tensor_name_map
from rich.console import Console
from rich.markup import escape
from torch import Tensor
from torch.nn import functional as F

from specdec.errors import CheckpointError, UnsupportedError
from specdec.target.gguf_rope import FACTORS, state_rope
from specdec.target.shards import first_line
from specdec.target.weights import check_finite

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

AGAIN = "Fetch it again."
RECIPE = 3  # raise when what `convert` writes changes: cached conversions are then made again
ARCHITECTURE, PRE, END_OF_TURN = "general.architecture", "tokenizer.ggml.pre", "tokenizer.ggml.eot_token_id"
PARTS = "split.count"
SAMPLED_ROWS = 1024
TWINS = 0.98  # mean cosine of two quantised copies of one embedding; of two different matrices it is near 0
# tokenizer.json entries that transformers' GGUF reader forgets, by the file's `tokenizer.ggml.pre`
DIGITS: dict[str, Any] = {
    "type": "Sequence",
    "pretokenizers": [
        {"type": "Digits", "individual_digits": True},
        {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
    ],
}
BYTES = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}
MENDED: dict[str, dict[str, Any]] = {
    # transformers 5.17 takes any Llama's tokenizer for SentencePiece's and decodes without a leading space
    "smollm": {"pre_tokenizer": DIGITS, "decoder": BYTES, "normalizer": None},
    "qwen2": {"normalizer": {"type": "NFC"}},
}
LARGEST_GEMMAS = {"gemma2": 46, "gemma3": 62}
"""Layers of the 27B: alone of their families they do not scale queries by the head size. No key says so; llama.cpp too
knows them by their layers."""
_CODES = {name: code for code, name in MODEL_ARCH_NAMES.items()}
QWEN_STOPS = ("<|im_end|>", "<|endoftext|>")  # Qwen ends a turn with the first and a text with the second


@dataclass(frozen=True, slots=True)
class Header:
    """What conversion needs to know beforehand.

    Args:
        architecture: llama.cpp's name, such as "llama" or "qwen2".
        pre: llama.cpp's name of the pre-tokenizer; "" if absent.
        end_of_turn: a stop id beside the end of sequence, if the file names one.
        said: the architecture's own values, by key without its name.
        factors: of rotary frequencies, by tensor name.
        sizes: numbers in each weight, by tensor name.
    """

    architecture: str
    pre: str
    end_of_turn: int | None
    said: Mapping[str, Any]
    factors: Mapping[str, Tensor]
    sizes: Mapping[str, int]


def read_header(source: Path) -> Header:
    """The header of a GGUF file; its tensors are checked to lie within the file.

    Raises:
        CheckpointError: not a GGUF file, or truncated.
        UnsupportedError: it is a part of a split one.
    """
    try:
        reader = GGUFReader(source)
        fields, tensors = reader.fields, reader.tensors
        wanted = (ARCHITECTURE, PRE, END_OF_TURN, PARTS)
        said = {name: fields[name].contents() for name in wanted if name in fields}
        own = f"{said.get(ARCHITECTURE)}."
        values = {name.removeprefix(own): fields[name].contents() for name in fields if name.startswith(own)}
        factors = {t.name: torch.tensor(t.data, dtype=torch.float32) for t in tensors if t.name in FACTORS}
        sizes = {t.name: int(t.n_elements) for t in tensors if t.name not in FACTORS}
    except (ValueError, IndexError, KeyError, OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"is not a GGUF file, or truncated: {error}", field=str(source),
                              remedy=AGAIN) from error  # fmt: skip
    if (parts := int(said.get(PARTS, 1))) > 1:
        raise UnsupportedError(f"is one of {parts} parts", field=str(source),
                               remedy="Join them with llama.cpp: llama-gguf-split --merge FIRST OUT.gguf")  # fmt: skip
    if ARCHITECTURE not in said:
        raise CheckpointError("names no architecture", field=str(source))
    eot = said.get(END_OF_TURN)
    return Header(str(said[ARCHITECTURE]), str(said.get(PRE, "")), None if eot is None else int(eot), values, factors,
                  sizes)  # fmt: skip


def convert(source: Path, directory: Path, name: str) -> None:
    """Write the model in `source` into the empty `directory`, telling the user on stderr.

    Raises:
        CheckpointError: the file is no GGUF, truncated, or lacks tensors.
        UnsupportedError: transformers does not read this architecture from GGUF.
        OSError: `directory` cannot be written.
    """
    console = Console(stderr=True)
    message = f"Preparing {name} from {source.name}: once, about half a minute per 100 MB"
    if not console.is_terminal:
        console.print(message, style="dim", soft_wrap=True, markup=False)
    # transformers draws bars of its own on stderr, across ours
    with console.status(escape(message)), redirect_stderr(io.StringIO()):
        header = read_header(source)
        model, tokenizer = _read(source)
        _refuse_leftovers(header, model)
        state_attention(header.architecture, header.said, header.factors, model.config)
        _tie_twins(model)
        _drop_quantization(model)
        for tensor, weight in model.named_parameters():
            check_finite(tensor, weight)
        stops = _stop_ids(header, model, tokenizer)
        _save(directory, model, tokenizer)
    _merge(directory / "tokenizer.json", MENDED.get(header.pre, {}))
    if stops:
        _merge(directory / "generation_config.json", {"eos_token_id": stops})


def _save(directory: Path, *parts: PreTrainedModel | PreTrainedTokenizerBase) -> None:
    try:
        for part in parts:
            part.save_pretrained(directory)
    except Exception as error:  # where a disk is full, safetensors and tokenizers raise kinds of their own
        raise OSError(first_line(error)) from error


def _read(source: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Model and tokenizer; through a directory of its own, where no other file is taken for the model's."""
    from transformers import AutoModelForCausalLM, AutoTokenizer  # seconds to import, needed once a model

    with TemporaryDirectory() as lone:
        (Path(lone) / "model.gguf").symlink_to(source.resolve())
        given: dict[str, Any] = {"gguf_file": "model.gguf", "local_files_only": True}
        try:
            tokenizer = AutoTokenizer.from_pretrained(lone, **given)
            load: Any = AutoModelForCausalLM.from_pretrained  # its type forgets output_loading_info
            model, report = load(lone, dtype=torch.float32, output_loading_info=True, **given)
        except (ValueError, KeyError, NotImplementedError) as error:
            raise UnsupportedError(f"transformers cannot read it: {error}", field=str(source),
                                   remedy="Take its safetensors instead.") from error  # fmt: skip
        except (OSError, RuntimeError, IndexError) as error:
            raise CheckpointError(f"cannot be read: {error}", field=str(source), remedy=AGAIN) from error
    if missing := sorted(report["missing_keys"]):
        raise CheckpointError("lacks tensors", field=str(source), value=", ".join(missing[:4]))
    return model, tokenizer


def _refuse_leftovers(header: Header, model: PreTrainedModel) -> None:
    """transformers takes the tensors it knows by name, and is silent about others, such as biases of a Llama."""
    if sum(header.sizes.values()) <= sum(weight.numel() for weight in model.parameters()):
        return
    places = get_tensor_name_map(_CODES[header.architecture], int(model.config.num_hidden_layers))
    known = {places.get_name(name, (".weight", ".bias")) for name in model.state_dict()}
    raise UnsupportedError("holds tensors that transformers' reader leaves out", field="GGUF file",
                           value=", ".join(sorted(header.sizes.keys() - known)[:4]),
                           remedy="Take its safetensors instead.")  # fmt: skip


def state_attention(
    architecture: str, said: Mapping[str, Any], factors: Mapping[str, Tensor], config: PretrainedConfig
) -> None:
    """Set in a config what the reader drops of attention and positions; see `Header`. Raises UnsupportedError."""
    state_rope(config, said, factors)
    if window := said.get("attention.sliding_window"):  # dropped for Phi-3; 0 stands for none
        config.sliding_window = int(window)
    if said.get("block_count") == LARGEST_GEMMAS.get(architecture, 0):
        config.query_pre_attn_scalar = config.hidden_size // config.num_attention_heads


def _tie_twins(model: PreTrainedModel) -> None:
    """Tie embeddings that the file stores twice, keeping the LM head's copy: it is quantised more finely."""
    ends: Any = model  # transformers types neither end
    inputs, outputs = ends.get_input_embeddings().weight, ends.get_output_embeddings().weight
    if inputs is outputs or inputs.shape != outputs.shape:
        return
    rows = torch.linspace(0, len(inputs) - 1, min(SAMPLED_ROWS, len(inputs))).long()
    if F.cosine_similarity(inputs[rows], outputs[rows], dim=1).mean() > TWINS:
        inputs.data = outputs.data
        model.config.tie_word_embeddings = True
        model.tie_weights()


def _drop_quantization(model: PreTrainedModel) -> None:
    """Forget that the weights were quantised; saving would say so in config.json."""
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    for key in ("hf_quantizer", "is_quantized", "quantization_method"):
        with suppress(AttributeError):
            delattr(model, key)
    model.config.dtype = torch.float32


def _stop_ids(header: Header, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    eos = model.config.eos_token_id
    stops = list(eos) if isinstance(eos, list | tuple) else [] if eos is None else [eos]
    if header.architecture.startswith("qwen"):
        vocab: Mapping[str, int] = tokenizer.get_vocab()
        stops += [vocab[token] for token in QWEN_STOPS if token in vocab]
    if header.end_of_turn is not None:
        stops.append(header.end_of_turn)
    return list(dict.fromkeys(stops))


def _merge(path: Path, entries: Mapping[str, Any]) -> None:
    document = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps(document | entries, ensure_ascii=False), encoding="utf-8")
