"""Conversations to token ids with a loss mask on what the assistant wrote, from the chat template alone.

Knows one thing about templates: how to ask them. No marker, offset or model name is written down here.

    token   <s>  [INST]  Hi  [/INST]  Hello  there  </s>
    mask     .     .     .     .        x      x     x

The end-of-turn token is in the mask: the assistant has to produce it. What a template adds after it is not.
Where the template carries `{% generation %}` markers they say which characters are the assistant's. Elsewhere
each answer is rendered twice, up to the question with the generation prompt and up to the answer: what the
second has beyond the first is the answer. Characters are compared, so merges across the seam do no harm.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from specdec.errors import SpecdecError
from training.data import TEXT, Conversation, Message, Sample, Skipped

GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
PROBE, OTHER_PROBE = "zqx", "jvk"  # answers no template would write by itself, without a letter in common
OWN_ANSWERS = (
    "Let the target write the answers (they carry their own ids and need no mask), or put {% generation %} "
    "and {% endgeneration %} around the assistant's text in the template."
)


class ChatTokenizer(Protocol):
    """What this file uses of a transformers fast tokenizer."""

    eos_token_id: int | None
    bos_token_id: int | None

    @property
    def all_special_ids(self) -> list[int]: ...
    @property
    def added_tokens_decoder(self) -> Mapping[int, Any]: ...
    def get_chat_template(self) -> str: ...
    def apply_chat_template(self, conversation: list[dict[str, str]], **options: Any) -> Any: ...
    def __call__(self, text: str, **options: Any) -> Any: ...
    def decode(self, token_ids: list[int], skip_special_tokens: bool = ...) -> str | list[str]: ...


class TemplateRefusal(ValueError):
    """The template will not render this conversation (an unknown role or order); counted, not fatal."""


@dataclass(frozen=True, slots=True)
class Rendered:
    """A text, the character spans in it that are the assistant's, and the conversation and turn it came from."""

    id: str
    text: str
    spans: tuple[tuple[int, int], ...]
    turn: int = 0


class ChatMasker:
    """Turns conversations into samples for one tokenizer.

    Args:
        tokenizer: a transformers fast tokenizer.
        stop_ids: the target's end-of-sequence ids; the one that ends answers is also found by asking.

    Attributes:
        method: "markers" or "prefix" (see the module's head), or "none" without a template (plain text only).
        stop_ids: the given ids, the tokenizer's own and the template's.

    Raises:
        SpecdecError: the template drops answers or re-renders the question once it is answered.
    """

    def __init__(self, tokenizer: ChatTokenizer, stop_ids: Collection[int] = ()) -> None:
        self.tokenizer = tokenizer
        template = _template(tokenizer)
        self.method = "none" if template is None else "markers" if GENERATION.search(template) else "prefix"
        own = () if tokenizer.eos_token_id is None else (tokenizer.eos_token_id,)
        self.stop_ids = frozenset(stop_ids) | frozenset(own)
        self._honours_prompt = True
        if template is not None:
            self._probe()

    def prompt_ids(self, messages: Sequence[Message]) -> list[int]:
        """Ids of the conversation so far with the generation prompt: what the target continues.

        Raises:
            SpecdecError: the tokenizer has no chat template.
            TemplateRefusal: the template will not render it.
        """
        text = self._render(messages, add_generation_prompt=True)
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def text(self, ids: Sequence[int]) -> str:
        """What an answer says, without control tokens: how it enters the next prompt."""
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=True))

    def samples(self, conversation: Conversation) -> list[Sample]:
        """One sample, or one per answer where the template renders earlier answers differently.

        A conversation without an answer gives none. Raises as `prompt_ids` and the constructor do.
        """
        messages = conversation.messages
        if messages and messages[0].role == TEXT:
            return [self._document(conversation.id, messages[0].content)]
        answers = [i for i, message in enumerate(messages) if message.role == "assistant"]
        if not answers:
            return []
        if self.method == "none":
            return [self._plain(conversation.id, messages)]
        if self.method == "markers":
            return [self._marked(conversation.id, messages)]
        return [self._masked(rendered) for rendered in self._spans(conversation.id, messages, answers)]

    def _document(self, id: str, text: str) -> Sample:
        ids = np.array(self.tokenizer(text)["input_ids"], dtype=np.int32)
        bos = self.tokenizer.bos_token_id
        return Sample(id, ids, ids != (-1 if bos is None else bos))

    def _plain(self, id: str, messages: Sequence[Message]) -> Sample:
        """For a model without a chat template: the prompt's text and then the completion's."""
        if [m.role for m in messages] != ["user", "assistant"]:
            raise _no_template()
        text = messages[0].content + messages[1].content
        encoded = self.tokenizer(text, return_offsets_mapping=True)
        mask = _covered(encoded["offset_mapping"], ((len(messages[0].content), len(text)),))
        return Sample(id, np.array(encoded["input_ids"], dtype=np.int32), mask)

    def _marked(self, id: str, messages: Sequence[Message]) -> Sample:
        encoded = _ask(
            self.tokenizer, messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
        )
        ids = np.array(encoded["input_ids"], dtype=np.int32)
        return Sample(id, ids, self._close(ids, np.array(encoded["assistant_masks"], dtype=np.bool_)))

    def _masked(self, rendered: Rendered) -> Sample:
        encoded = self.tokenizer(rendered.text, add_special_tokens=False, return_offsets_mapping=True)
        ids = np.array(encoded["input_ids"], dtype=np.int32)
        mask = self._close(ids, _covered(encoded["offset_mapping"], rendered.spans))
        return Sample(rendered.id, ids, mask, rendered.turn)

    def _close(self, ids: NDArray[np.int32], mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
        """End each run at its end-of-turn token: take it in where it follows, cut what comes after."""
        stops = np.isin(ids, list(self.stop_ids))
        closed = mask.copy()
        edges = np.flatnonzero(np.diff(np.concatenate(([False], mask, [False])).astype(np.int8)))
        for start, end in edges.reshape(-1, 2):
            within = np.flatnonzero(stops[start:end])
            if within.size:
                closed[start + within[-1] + 1 : end] = False
            elif end < len(ids) and stops[end]:
                closed[end] = True
        return closed

    def _spans(self, id: str, messages: Sequence[Message], answers: Sequence[int]) -> list[Rendered]:
        whole = self._render(messages[: answers[-1] + 1])
        spans: list[tuple[int, int]] = []
        apart: list[Rendered] = []
        for turn, at in enumerate(answers):
            upto = self._render(messages[: at + 1])
            span = (self._start(messages[:at], upto), len(upto))
            spans.append(span)
            apart.append(Rendered(id, upto, (span,), turn))
        # A template that rewrites history (drops earlier reasoning, moves the system prompt) has no one text
        # in which all answers stand as they were written: each answer then goes with its own context.
        stable = all(whole.startswith(part.text) for part in apart)
        return [Rendered(id, whole, tuple(spans))] if stable else apart

    def _start(self, before: Sequence[Message], upto: str) -> int:
        """Where in `upto`, which is `before` and one answer, that answer begins."""
        prompt = self._render(before, add_generation_prompt=True)
        start = _common(prompt, upto)
        if prompt[start:].strip():
            raise _unmaskable("renders the question differently once it is answered")
        if self._honours_prompt:
            return start
        # Without generation prompts the header is what all answers share; a leading space is the answer's.
        probed = [self._render([*before, Message("assistant", text)]) for text in (PROBE, OTHER_PROBE)]
        header = _common(*probed)
        return max(start, len(upto[:header].rstrip(" "))) if upto.startswith(probed[0][:header]) else start

    def _probe(self) -> None:
        """Ask once: does the template keep answers, know generation prompts, and how does it end a turn."""
        question = [Message("user", "a")]
        bare = self._render(question)
        self._honours_prompt = self._render(question, add_generation_prompt=True) != bare
        answered = self._render([*question, Message("assistant", PROBE)])
        if PROBE not in answered:
            raise _unmaskable("drops the assistant's text")
        if self.method == "prefix":
            self._start(question, answered)
        after = answered[answered.rindex(PROBE) + len(PROBE) :]
        tail = self.tokenizer(after, add_special_tokens=False)["input_ids"]
        special = set(self.tokenizer.all_special_ids)
        special |= {id for id, token in self.tokenizer.added_tokens_decoder.items() if token.special}
        self.stop_ids |= frozenset(next(([id] for id in tail if id in special), []))

    def _render(self, messages: Sequence[Message], add_generation_prompt: bool = False) -> str:
        if self.method == "none":
            raise _no_template()
        options = {"tokenize": False, "add_generation_prompt": add_generation_prompt}
        return str(_ask(self.tokenizer, messages, **options))


def mask_conversations(
    conversations: Iterable[Conversation], masker: ChatMasker, skipped: Skipped | None = None
) -> Iterator[Sample]:
    """Samples of all conversations that have an answer, in order; the others are counted.

    Raises:
        SpecdecError: no conversation has one, or the template cannot be masked.
    """
    skipped = Skipped() if skipped is None else skipped
    found = False
    for conversation in conversations:
        try:
            samples = masker.samples(conversation)
        except TemplateRefusal as refusal:
            skipped.add(f"refused by the chat template: {refusal}")
            continue
        if not any(sample.loss_mask.any() for sample in samples):
            skipped.add("no assistant turn")
            continue
        found = True
        yield from samples
    if not found:
        raise SpecdecError(
            f"has no assistant turns to learn from: {skipped}",
            field="data.prompts",
            remedy="Let the target answer first (the default), or give rows with answers.",
        )


def _template(tokenizer: ChatTokenizer) -> str | None:
    try:
        return tokenizer.get_chat_template()
    except ValueError:  # how transformers says that there is none
        return None


def _ask(tokenizer: ChatTokenizer, messages: Sequence[Message], **options: Any) -> Any:
    from jinja2.exceptions import TemplateError

    turns = [{"role": message.role, "content": message.content} for message in messages]
    try:
        return tokenizer.apply_chat_template(turns, **options)
    except TemplateError as error:
        raise TemplateRefusal(str(error)) from error


def _covered(offsets: Sequence[tuple[int, int]], spans: Sequence[tuple[int, int]]) -> NDArray[np.bool_]:
    """Which tokens share a character with a span. Tokens without characters share none."""
    table = np.array(offsets, dtype=np.int64).reshape(-1, 2)
    mask = np.zeros(len(table), dtype=np.bool_)
    for start, end in spans:
        mask |= (table[:, 0] < end) & (table[:, 1] > start) & (table[:, 1] > table[:, 0])
    return mask


def _common(one: str, other: str) -> int:
    """Length of the common prefix, by halving: these are whole conversations."""
    low, high = 0, min(len(one), len(other))
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if one[:middle] == other[:middle] else (low, middle - 1)
    return low


def _unmaskable(why: str) -> SpecdecError:
    return SpecdecError(f"cannot be masked: it {why}", field="chat template", remedy=OWN_ANSWERS)


def _no_template() -> SpecdecError:
    return SpecdecError(
        "the target's tokenizer has none, and the data are conversations",
        field="chat template",
        remedy="Use an instruct model, or rows with `text` or one `prompt` and `completion`.",
    )
