"""A random eight-layer Llama and a head taught on its greedy text in seconds, for checks on any machine.

The head is trained crudely on purpose: counters that are neither zero nor full tell more.
Dimension legend: B sequences, T positions, H hidden, A taps.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from bench.chain import features_of
from specdec.head.config import HeadConfig
from specdec.head.model import DraftHead
from specdec.layers.heads import Heads

LAYERS, HIDDEN, VOCAB, LENGTH = 8, 128, 512, 256
TAPS = (2, 4, 5)  # inputs of layers 2, n / 2, n - 3
DRAFT_VOCAB, TEXTS, TEXT_LENGTH, STEPS = 256, 32, 48, 100


def tiny_target(directory: Path, seed: int = 0) -> Any:
    """A float32 Llama with random weights, saved with a tokenizer of numbered words."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        intermediate_size=2 * HIDDEN,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=LENGTH,
        initializer_range=0.03,
        tie_word_embeddings=False,
        bos_token_id=1,
        eos_token_id=2,
        dtype="float32",
    )
    model: Any = LlamaForCausalLM(config)
    model.eval()
    model.save_pretrained(directory)
    _tokenizer().save_pretrained(directory)
    return model


def _tokenizer() -> PreTrainedTokenizerFast:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace

    words = Tokenizer(WordLevel({f"w{i}": i for i in range(VOCAB)}, unk_token="w0"))
    words.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]  # transformers leaves it untyped
        tokenizer_object=words, unk_token="w0", bos_token="w1", eos_token="w2"
    )


def random_prompts(count: int, seed: int = 1) -> list[list[int]]:
    """Prompts of 8 random token ids."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCAB, (count, 8), generator=generator).tolist()


def taught_head(model: Any, seed: int = 2) -> DraftHead:
    """A head that has half learnt the target's greedy answers to `random_prompts`, by two unrolled steps."""
    torch.manual_seed(seed)
    prompts = torch.tensor(random_prompts(TEXTS))
    with torch.inference_mode():
        text = model.generate(
            prompts, attention_mask=torch.ones_like(prompts), do_sample=False, max_new_tokens=TEXT_LENGTH,
            min_new_tokens=TEXT_LENGTH, pad_token_id=0,
        )  # fmt: skip
        features = features_of(model, text, TAPS)
    head = _fresh_head(text, model.config.rope_parameters["rope_theta"])
    _train(head, model.get_input_embeddings().weight.detach(), features.clone(), text.clone())
    return head


def _fresh_head(text: Tensor, theta: float) -> DraftHead:
    ids = text.flatten().bincount(minlength=VOCAB).argsort(descending=True)[:DRAFT_VOCAB].sort().values
    head = DraftHead(
        HeadConfig(
            hidden=HIDDEN,
            target_hidden=HIDDEN,
            taps=TAPS,
            intermediate=2 * HIDDEN,
            heads=4,
            kv_heads=2,
            head_dim=HIDDEN // 4,
            vocab=VOCAB,
            draft_vocab=DRAFT_VOCAB,
            eps=1e-6,
            theta=theta,
            max_length=LENGTH,
        )
    )
    for parameter in head.parameters():
        if parameter.dim() == 1:
            torch.nn.init.ones_(parameter)
        else:
            torch.nn.init.normal_(parameter, std=0.05)
    head.ids.copy_(ids)
    return head


def _causal(heads: Heads, scale: float) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in heads.turned())
    out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=True)
    return out.transpose(1, 2)


def _train(head: DraftHead, embedding: Tensor, features: Tensor, text: Tensor) -> None:
    place = torch.full((VOCAB,), -100).index_copy(0, head.ids, torch.arange(DRAFT_VOCAB))
    optimizer = torch.optim.AdamW(head.parameters(), lr=3e-3)
    for step in range(STEPS):
        rows = torch.arange(16) + 16 * (step % (TEXTS // 16))
        loss = _loss(head, embedding, features[rows], text[rows], place)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
        optimizer.step()


def _loss(head: DraftHead, embedding: Tensor, features: Tensor, text: Tensor, place: Tensor) -> Tensor:
    """Cross-entropy of two steps: row t reads feature(t), token(t + 1) and is asked for token(t + 2)."""
    length = text.shape[1] - 3
    angles = head.angles(torch.arange(length)[None])
    g, total = head.fuse(features[:, :length]), torch.zeros(())
    for step in range(2):
        y = head(embedding[text[:, step + 1 : step + 1 + length]], g, angles, _causal)
        wanted = place[text[:, step + 2 : step + 2 + length]]
        total = total + F.cross_entropy(head.logits(y).flatten(0, 1), wanted.flatten(), ignore_index=-100)
        g = head.feedback(y)
    return total
