"""Bytes of tokens, in the three ways tokenizers spell them; /tokenize and /detokenize; the page; the model list."""

from __future__ import annotations

import re

import httpx
from serving import LENGTH, MODEL
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from specdec import __version__
from specdec.target.vocabulary import Vocabulary


def vocabulary(words: list[str], decoder: decoders.Decoder) -> Vocabulary:
    inner = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, []))
    inner.decoder = decoder
    return Vocabulary(PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="</s>"), len(words) + 3)


def test_byte_level_symbols() -> None:
    made = vocabulary(["\u0120the", "\u00c3", "\u00a9", "</s>"], decoders.ByteLevel())
    assert [made.bytes(i) for i in range(4)] == [b" the", b"\xc3", b"\xa9", b"</s>"]
    assert made.text(1) == "\ufffd"
    assert made.bytes(5) == made.bytes(99) == b""
    assert made.special == {3, 4, 5, 6}


def test_sentencepiece_spaces_and_bytes() -> None:
    made = vocabulary(["\u2581the", "<0xC3>", "caf\u00e9", "</s>"], decoders.ByteFallback())
    assert [made.bytes(i) for i in range(3)] == [b" the", b"\xc3", "caf\u00e9".encode()]


def test_tokenize_and_back(http: httpx.Client) -> None:
    told = http.post("/tokenize", json={"prompt": "a b!", "return_token_strs": True}).json()
    assert told == {
        "count": 4,
        "max_model_len": LENGTH,
        "tokens": told["tokens"],
        "token_strs": ["a", " ", "b", "!"],
    }
    assert http.post("/detokenize", json={"tokens": told["tokens"]}).json() == {"prompt": "a b!"}
    chat = http.post("/tokenize", json={"messages": [{"role": "user", "content": "hi"}]}).json()
    assert http.post("/detokenize", json={"tokens": chat["tokens"]}).json() == {"prompt": "u:hi\na:"}
    assert http.post("/detokenize", json={"tokens": [10**9]}).status_code == 400
    assert http.post("/tokenize", json={}).json()["error"]["param"] == "prompt"
    assert http.post("/tokenize", json={"prompt": "x", "model": "other"}).status_code == 404


def test_version_models_and_health(http: httpx.Client) -> None:
    assert http.get("/version").json() == {"version": __version__}
    (model,) = http.get("/v1/models").json()["data"]
    assert (model["id"], model["object"], model["max_model_len"]) == (MODEL, "model", LENGTH)
    assert http.get(f"/v1/models/{MODEL}").json() == model
    health = http.get("/health")
    assert (health.status_code, health.content) == (200, b"")
    assert http.head("/health").status_code == 200


def test_the_page_needs_nobody_else(http: httpx.Client) -> None:
    page = http.get("/")
    assert page.headers["content-type"] == "text/html; charset=utf-8"
    assert "default-src 'none'" in page.headers["content-security-policy"]
    assert not re.findall(r"""(?:https?:)?//[a-z]|src=|@import|<link[^>]+href="(?!data:)""", page.text)
    assert "innerHTML" not in page.text  # what the model writes is text, never markup
