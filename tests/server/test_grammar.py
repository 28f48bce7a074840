"""Grammars at the nodes of a tree: the same as token by token, and the matcher stands where it stood."""

from __future__ import annotations

import pytest
import torch

from specdec.errors import RequestError
from specdec.generate import SpecDecoder
from specdec.server.grammar import Grammars, TreeGrammar
from specdec.server.schema import ResponseFormat
from specdec.target.vocabulary import Vocabulary
from specdec.tree import build, pad, root_only

SCHEMA = {
    "type": "object",
    "properties": {"a": {"type": "boolean"}},
    "required": ["a"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def grammars(decoder: SpecDecoder) -> Grammars:
    info = decoder.engine.target.info
    return Grammars(Vocabulary(decoder.tokenizer, info.vocab), info.stop_ids)


def wish(schema: object) -> ResponseFormat:
    return ResponseFormat.model_validate(
        {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    )


def compiled(grammars: Grammars) -> TreeGrammar:
    grammar = grammars.compile(wish(SCHEMA))
    assert grammar is not None
    return grammar


def test_every_node_sees_its_own_path(grammars: Grammars, decoder: SpecDecoder) -> None:
    def ids(text: str) -> list[int]:
        return list(decoder.tokenizer.encode(text, add_special_tokens=False))

    grammar = compiled(grammars)
    grammar.accept(ids('{"a":'))
    #      ':' -> t -> r -> u
    #        `--> f -> a        `--> x -> y   (forbidden)
    tokens = torch.tensor([ids(":tfraxuy")])
    parents = torch.tensor([[0, 0, 0, 1, 2, 0, 3, 5]])
    tree = pad(build(tokens, parents), 10)
    allowed = grammar.allowed(tree, 0)
    assert allowed.shape == (10, 128)

    def after(text: str) -> torch.Tensor:
        alone = compiled(grammars)
        alone.accept(ids('{"a":' + text))
        return alone.allowed(root_only(torch.tensor([0])), 0)[0]

    for node, text in enumerate(["", "t", "f", "tr", "fa"]):
        assert torch.equal(allowed[node], after(text)), text
    assert torch.equal(allowed[6], after("tru"))
    assert allowed[[5, 7, 8, 9]].all(), "what cannot be reached stays finite"
    assert set(allowed[3].nonzero()[:, 0].tolist()) == set(ids("u"))
    again = grammar.allowed(tree, 0)
    assert torch.equal(allowed, again), "looking ahead must not move the grammar"


def test_a_complete_answer_only_ends(grammars: Grammars, decoder: SpecDecoder) -> None:
    grammar = compiled(grammars)
    grammar.accept(decoder.tokenizer.encode('{"a":true}', add_special_tokens=False))
    end = decoder.engine.target.info.stop_ids
    assert grammar.allowed(root_only(torch.tensor([0])), 0)[0].nonzero()[:, 0].tolist() == list(end)
    for _ in range(2):  # ... and ends for good: `ignore_eos` goes on after it, with and without a tree
        chain = build(torch.tensor([[9, *end, *end]]), torch.tensor([[0, 0, 1]]))
        assert [row.nonzero()[:, 0].tolist() for row in grammar.allowed(chain, 0)] == [list(end)] * 3
        grammar.accept(list(end))


def test_forks_go_their_own_way(grammars: Grammars, decoder: SpecDecoder) -> None:
    first = compiled(grammars)
    second = first.fork()
    first.accept(decoder.tokenizer.encode('{"a"', add_special_tokens=False))
    start = compiled(grammars).allowed(root_only(torch.tensor([0])), 0)
    assert torch.equal(second.allowed(root_only(torch.tensor([0])), 0), start)


def test_a_forbidden_token_is_a_bug_not_a_silence(grammars: Grammars) -> None:
    with pytest.raises(ValueError, match="refused"):
        compiled(grammars).accept([50])


CANNOT = [
    ({"type": "nonsense"}, ""),
    ({"type": "string", "pattern": "a(?=b)"}, "look-behind, is not supported"),
    ({"$ref": "#"}, "the grammar failed: no text satisfies it"),
]


@pytest.mark.parametrize(("schema", "why"), CANNOT)
def test_schemas_that_cannot_be_enforced(grammars: Grammars, schema: object, why: str) -> None:
    with pytest.raises(RequestError, match=f"cannot be enforced: .*{why}") as refused:
        grammars.compile(wish(schema))
    assert "\n" not in str(refused.value)


def test_no_wish_no_grammar(grammars: Grammars) -> None:
    assert grammars.compile(None) is None
    assert grammars.compile(ResponseFormat(type="text")) is None
    with pytest.raises(RequestError, match="end-of-sequence"):
        Grammars(grammars.vocabulary, ()).compile(ResponseFormat(type="json_object"))
