"""Golden token tables: per template the tokens of a short dialogue and, under them, what is trained on."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from specdec.errors import SpecdecError
from training.data import Conversation, Message, Skipped
from training.mask import ChatMasker, TemplateRefusal, mask_conversations

TEMPLATES = Path(__file__).parent / "templates"
MARKS = [
    "<s>",
    "</s>",
    "<|im_start|>",
    "<|im_end|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
]
WORDS = [
    "system",
    "user",
    "assistant",
    "Hi",
    "Hello",
    "there",
    "Be",
    "brief",
    "Bye",
    "bye",
    "You",
    "are",
    "helpful",
]
WORDS += ["think", "answered", "zqx", "jvk", "a", "<", ">", "/", ":", "[INST]", "[/INST]", "\n"]


def tokenizer(template: str | None, eos: str = "</s>") -> PreTrainedTokenizerFast:
    """A word-level tokenizer: words, brackets and each newline; a space belongs to the word after it."""
    words = [*MARKS, "?", *WORDS, " ", *(" " + word for word in WORDS)]
    model = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="?"))
    model.pre_tokenizer = pre_tokenizers.Split(Regex(r" ?\[/?INST\]| ?\w+|\n| ?[^\w\s]"), "isolated")
    model.decoder = decoders.Fuse()
    model.add_special_tokens([AddedToken(mark, special=True, normalized=False) for mark in MARKS])
    fast = PreTrainedTokenizerFast(tokenizer_object=model, bos_token="<s>", eos_token=eos, unk_token="?")  # type: ignore[no-untyped-call]  # theirs
    if template:
        fast.chat_template = (TEMPLATES / f"{template}.jinja").read_text()
    return fast


def talk(*contents: str, system: str | None = None, roles: str = "ua") -> Conversation:
    names = {"u": "user", "a": "assistant"}
    turns = [Message(names[roles[i % len(roles)]], text) for i, text in enumerate(contents)]
    head = [Message("system", system)] if system else []
    return Conversation("c", "test", "MIT", (*head, *turns))


def table(fast: PreTrainedTokenizerFast, conversation: Conversation) -> list[str]:
    """Per sample two aligned rows: the tokens (a newline drawn as |), and x under what is in the mask."""
    rows = []
    for sample in ChatMasker(fast).samples(conversation):
        tokens = [
            t.replace("\n", "|").replace(" ", "_") for t in fast.convert_ids_to_tokens(sample.ids.tolist())
        ]
        marks = ["x" if on else "." for on in sample.loss_mask]
        rows.append(" ".join(tokens))
        rows.append(" ".join(m.ljust(len(t)) for t, m in zip(tokens, marks, strict=True)).rstrip())
    return rows


TWO_TURNS = talk("Hi", "Hello there", "Bye", "Bye bye")
CHATML = [
    "<|im_start|> user | Hi <|im_end|> | <|im_start|> assistant | Hello _there <|im_end|> | "
    "<|im_start|> user | Bye <|im_end|> | <|im_start|> assistant | Bye _bye <|im_end|> |",
    ".            .    . .  .          . .            .         . x     x      x          . "
    ".            .    . .   .          . .            .         . x   x    x          .",
]


@pytest.mark.parametrize("template", ["chatml", "chatml_markers", "chatml_unprompted"])
@pytest.mark.parametrize("eos", ["</s>", "<|im_end|>"])
def test_chatml(template: str, eos: str) -> None:
    """With markers, with generation prompts, with neither: one table, whatever the tokenizer calls eos."""
    assert table(tokenizer(template, eos), TWO_TURNS) == CHATML


def test_llama3_strips_the_answer() -> None:
    assert table(tokenizer("llama3"), talk("Hi", "  Hello there\n", "Bye", "Bye bye")) == [
        "<s> <|start_header_id|> user <|end_header_id|> | | Hi <|eot_id|> "
        "<|start_header_id|> assistant <|end_header_id|> | | Hello _there <|eot_id|> "
        "<|start_header_id|> user <|end_header_id|> | | Bye <|eot_id|> "
        "<|start_header_id|> assistant <|end_header_id|> | | Bye _bye <|eot_id|>",
        ".   .                   .    .                 . . .  .          "
        ".                   .         .                 . . x     x      x          "
        ".                   .    .                 . . .   .          "
        ".                   .         .                 . . x   x    x",
    ]


def test_mistral_has_no_generation_prompt() -> None:
    conversation = talk("Hi", "Hello there", "Bye", "Bye bye", system="Be brief")
    assert table(tokenizer("mistral"), conversation) == [
        "<s> [INST] _Be _brief | | Hi _[/INST] _Hello _there </s> [INST] _Bye _[/INST] _Bye _bye </s>",
        ".   .      .   .      . . .  .        x      x      x    .      .    .        x    x    x",
    ]


def test_qwen2_ends_without_newline() -> None:
    assert table(tokenizer("qwen2"), TWO_TURNS) == [
        "<|im_start|> system | You _are _helpful <|im_end|> | " + CHATML[0].removesuffix(" |"),
        ".            .      . .   .    .        .          . " + CHATML[1].removesuffix("          ."),
    ]


def test_qwen3_rewrites_history_and_gives_one_sample_per_answer() -> None:
    assert table(tokenizer("qwen3"), TWO_TURNS) == [
        "<|im_start|> user | Hi <|im_end|> | "
        "<|im_start|> assistant | < think > | | < / think > | | Hello _there <|im_end|> |",
        ".            .    . .  .          . "
        ".            .         . x x     x x x x x x     x x x x     x      x          .",
        "<|im_start|> user | Hi <|im_end|> | <|im_start|> assistant | Hello _there <|im_end|> | "
        "<|im_start|> user | Bye <|im_end|> | "
        "<|im_start|> assistant | < think > | | < / think > | | Bye _bye <|im_end|> |",
        ".            .    . .  .          . .            .         . .     .      .          . "
        ".            .    . .   .          . "
        ".            .         . x x     x x x x x x     x x x x   x    x          .",
    ]


def test_the_masked_span_decodes_to_the_answer() -> None:
    """Also for an answer that starts like the probe does."""
    for template in ("chatml", "chatml_unprompted", "llama3", "qwen2"):
        fast = tokenizer(template)
        (sample,) = ChatMasker(fast).samples(talk("Hi", "zqx there"))
        assert fast.decode(sample.ids[sample.loss_mask], skip_special_tokens=True) == "zqx there"
        assert sample.ids[sample.loss_mask][-1] in ChatMasker(fast).stop_ids
        assert not sample.loss_mask[0] and sample.ids.dtype == np.int32


def test_prompt_ids_are_where_the_mask_begins() -> None:
    for template in ("chatml", "llama3", "mistral", "qwen2", "qwen3"):
        masker = ChatMasker(tokenizer(template))
        (sample,) = masker.samples(talk("Hi", "Hello there"))
        prompt = masker.prompt_ids([Message("user", "Hi")])
        assert sample.ids[: len(prompt)].tolist() == prompt
        assert np.flatnonzero(sample.loss_mask)[0] == len(prompt)
        assert masker.text(sample.ids[len(prompt) :].tolist()).endswith("there") or template != "llama3"


@pytest.mark.parametrize(
    ("template", "why"),
    [("rewriting", "renders the question differently"), ("forgetful", "drops the assistant's")],
)
def test_a_template_that_cannot_be_masked_says_why_and_what_to_do(template: str, why: str) -> None:
    with pytest.raises(SpecdecError, match=why) as caught:
        ChatMasker(tokenizer(template))
    assert caught.value.remedy is not None and "{% generation %}" in caught.value.remedy


def test_conversations_without_answers_are_counted_and_an_error_when_there_is_nothing_else() -> None:
    masker, skipped = ChatMasker(tokenizer("chatml")), Skipped()
    unanswered = Conversation("q", "", "", (), ("Hi",))
    assert len(list(mask_conversations([unanswered, TWO_TURNS], masker, skipped))) == 1
    assert skipped.reasons == {"no assistant turn": 1}
    with pytest.raises(SpecdecError, match="no assistant turns"):
        list(mask_conversations([unanswered], masker))


def test_a_refused_conversation_is_counted_with_the_templates_words() -> None:
    masker, skipped = ChatMasker(tokenizer("mistral")), Skipped()
    odd = talk("Hi", "Hello", "Bye", roles="aua")
    with pytest.raises(TemplateRefusal):
        masker.samples(odd)
    list(mask_conversations([odd, TWO_TURNS], masker, skipped))
    assert "must alternate" in str(skipped)


def test_plain_text_and_completion_need_no_template() -> None:
    fast = tokenizer(None)
    masker = ChatMasker(fast)
    (text,) = masker.samples(Conversation("t", "", "", (Message("text", "Hello there"),)))
    assert text.loss_mask.all()
    (pair,) = masker.samples(talk("Hi", " there"))
    assert pair.loss_mask.tolist() == [False, True]
    with pytest.raises(SpecdecError, match="chat template"):
        masker.samples(TWO_TURNS)
    with pytest.raises(SpecdecError, match="chat template"):
        masker.prompt_ids([Message("user", "Hi")])
