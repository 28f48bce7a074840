"""Grammars over tokens: JSON objects and JSON schemas, enforced at every node of a draft tree.

`TreeGrammar` is the engine's `Constraint`: it walks llguidance's matcher down the tree and back up, so that the target
draws under the very law it would have drawn under token by token. Compiling is slow and may run in any thread.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch
from llguidance import LLMatcher, LLTokenizer
from torch import Tensor

from specdec.errors import RequestError
from specdec.server.schema import ResponseFormat
from specdec.target.vocabulary import Vocabulary
from specdec.tree import DraftTree

WHITESPACE = r"[ \n]{0,16}"  # between tokens of JSON; unbounded, small models never stop indenting
ANY_OBJECT = {"type": "object"}
SPECIAL = b"\xff"  # llguidance's mark of tokens that stand for no text


class _Tokens:
    """The vocabulary in the shape llguidance reads."""

    is_tokenizer_wrapper = True
    bos_token_id = None

    def __init__(self, vocabulary: Vocabulary, stop_ids: Sequence[int]) -> None:
        special = vocabulary.special | set(stop_ids)
        self._vocabulary = vocabulary
        self.eos_token_id = stop_ids[0]
        self.special_token_ids = sorted(special)
        self.tokens = [
            SPECIAL + b"[%d]" % token if token in special else vocabulary.bytes(token)
            for token in range(vocabulary.size)
        ]

    def __call__(self, text: str | bytes) -> list[int]:
        plain = text if isinstance(text, str) else text.decode("utf-8", "replace")
        ids: list[int] = self._vocabulary.tokenizer.encode(plain, add_special_tokens=False)
        return ids


class Grammars:
    """Makes grammars for one vocabulary.

    Args:
        vocabulary: of the target.
        stop_ids: tokens that end an answer; a grammar lets them through when it is complete.
    """

    def __init__(self, vocabulary: Vocabulary, stop_ids: Sequence[int]) -> None:
        self.vocabulary, self.stop_ids = vocabulary, tuple(stop_ids)

    @cached_property
    def _tokenizer(self) -> LLTokenizer:
        return LLTokenizer(_Tokens(self.vocabulary, self.stop_ids), eos_token=list(self.stop_ids))  # type: ignore[arg-type]  # has the wrapper's shape

    def compile(self, wish: ResponseFormat | None) -> TreeGrammar | None:
        """A fresh grammar, None for plain text. Raises RequestError for a schema that cannot be enforced."""
        if wish is None or wish.type == "text":
            return None
        if not self.stop_ids:
            raise RequestError("needs a target with an end-of-sequence token", field="response_format")
        schema = ANY_OBJECT if wish.json_schema is None else wish.json_schema.schema_
        grammar = TreeGrammar(self._matcher(schema), self.vocabulary.size)
        try:
            grammar.fork().begin()
        except ValueError as error:
            raise _refused(str(error)) from None
        return grammar

    def _matcher(self, schema: dict[str, Any]) -> LLMatcher:
        try:
            text = json.dumps(schema, allow_nan=False)
            grammar = LLMatcher.grammar_from_json_schema(text, overrides={"whitespace_pattern": WHITESPACE})
        except (ValueError, RecursionError) as error:
            raise _refused(str(error)) from None
        failed, messages = LLMatcher.validate_grammar_with_warnings(grammar, self._tokenizer)
        matcher = LLMatcher(self._tokenizer, grammar, log_level=0)
        if failed or matcher.is_error():
            raise _refused(messages[0] if failed else _told(matcher))
        return matcher


def _refused(why: str) -> RequestError:
    return RequestError(f"cannot be enforced: {_in_a_line(why)}", field="response_format.json_schema")


def _told(matcher: LLMatcher) -> str:
    """What went wrong."""
    told = _in_a_line(matcher.get_error())
    return "no text satisfies it" if told == "NoExtensionBias" else told


def _in_a_line(told: str) -> str:
    """llguidance's message without its whole state behind it."""
    return " ".join(told.partition("<state>")[0].split())


class TreeGrammar:
    """A grammar and how far one answer has come in it.

    Args:
        matcher: llguidance's, at the start of the answer.
        vocab: V of the target's logits.
    """

    def __init__(self, matcher: LLMatcher, vocab: int) -> None:
        self.matcher, self.vocab = matcher, vocab

    def fork(self) -> TreeGrammar:
        """An independent copy at the same place."""
        return TreeGrammar(self.matcher.deep_copy(), self.vocab)

    def begin(self) -> None:
        """Take a first token: whether one can be, and how long a large expression takes, only shows then.

        Raises:
            ValueError: none can be.
        """
        self.accept(self._mask().nonzero()[:1, 0].tolist())

    def allowed(self, tree: DraftTree, row: int) -> Tensor:
        """bool [N, V]: tokens permitted after each node of tree `row`.

        The root is already accepted, so the matcher stands behind it. Nodes the grammar forbids are never reached;
        everything is permitted after them, which keeps their distributions finite.
        """
        size = int(tree.sizes[row])
        tokens, parents = tree.tokens[row, :size].tolist(), tree.parents[row, :size].tolist()
        children: list[list[int]] = [[] for _ in range(size)]
        for node in range(1, size):
            children[parents[node]].append(node)
        allowed = torch.ones(tree.nodes, self.vocab, dtype=torch.bool)
        self._descend(0, tokens, children, allowed)
        return allowed

    def _descend(self, node: int, tokens: list[int], children: list[list[int]], allowed: Tensor) -> None:
        """Fill in a subtree; the matcher stands behind `node`, before and after."""
        allowed[node] = self._mask()
        for child in children[node]:
            if allowed[node, tokens[child]]:
                read = self.matcher.try_consume_tokens([tokens[child]])  # 0 behind the end, see `accept`
                self._descend(child, tokens, children, allowed)
                self.matcher.rollback(read)

    def _mask(self) -> Tensor:
        bits = np.frombuffer(self.matcher.compute_bitmask(), dtype=np.uint8)
        if self.matcher.is_error():
            raise ValueError(f"the grammar failed: {_told(self.matcher)}")
        return torch.from_numpy(np.unpackbits(bits, bitorder="little")[: self.vocab].astype(np.bool_))

    def accept(self, tokens: Sequence[int]) -> None:
        """These tokens were emitted. Raises ValueError when the grammar forbids one of them (a bug)."""
        for token in tokens:
            if self.matcher.is_stopped() and not self.matcher.is_error():
                return  # complete: what follows is the end of the answer, which the matcher does not read
            if not self.matcher.consume_token(token):
                raise ValueError(f"the grammar refused an emitted token: {_told(self.matcher)}")
