"""With the C kernels speculation is exact in bfloat16, too: a node has, bit by bit, the logits of its path alone."""

from __future__ import annotations

import engines
import pytest
import tiny
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from specdec.attention.protocol import chunk_rows, tree_rows
from specdec.cache import KVCache
from specdec.drafting.ngram import NgramDrafter
from specdec.drafting.protocol import Shape
from specdec.layers import linear
from specdec.native.library import library
from specdec.sampling import Sampling
from specdec.target.load import load_target
from specdec.target.protocol import Target
from specdec.tree import build

pytestmark = pytest.mark.skipif(library() is None, reason="no C compiler")
SIZES = {
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "num_hidden_layers": 4,
}


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Target:
    """A llama in bfloat16 whose heads the kernels take."""
    path, patch = tmp_path_factory.mktemp("llama"), pytest.MonkeyPatch()
    torch.manual_seed(3)
    LlamaForCausalLM(LlamaConfig(**{**tiny.COMMON, **SIZES})).save_pretrained(path)
    tiny.tokenizer().save_pretrained(path)
    # also where a processor multiplies bfloat16 itself and oneDNN would be taken
    patch.setattr(linear, "packing_of", lambda weight: "native")
    with patch.context():
        loaded = load_target(str(path), dtype=torch.bfloat16, prefer="lean").target
    patch.undo()
    assert engines.attention_of(loaded) == "native"
    return loaded


@torch.inference_mode()
def test_a_tree_and_its_paths_agree_in_every_bit(target: Target) -> None:
    generator = torch.Generator().manual_seed(0)
    nodes, prefix = 24, 50
    text = torch.randint(3, 128, (1, prefix), generator=generator)
    tokens = torch.randint(3, 128, (1, nodes), generator=generator)
    tree = build(tokens, torch.tensor([[0] + [(5 * i) % i for i in range(1, nodes)]]))
    slot, length, none = torch.tensor([0]), torch.tensor([prefix]), torch.tensor([0])
    cache = KVCache(target.info.cache, 1, 128)
    target.forward(text, chunk_rows(slot, none, prefix), cache, ())
    logits = target.logits(target.forward(tokens, tree_rows(slot, length, tree), cache, ()).final)
    for node in range(nodes):
        path = [i for i in range(node + 1) if int(tree.ancestors[0, node]) >> i & 1]
        alone = KVCache(target.info.cache, 1, 100)
        for at in range(prefix):  # token by token, as plain decoding does
            target.forward(text[:, at : at + 1], chunk_rows(slot, none + at, 1), alone, ())
        for at, i in enumerate(path):
            final = target.forward(tokens[:, i : i + 1], chunk_rows(slot, length + at, 1), alone, ()).final
        assert torch.equal(target.logits(final)[0, -1], logits[0, node]), node


@pytest.mark.parametrize(
    "sampling", [Sampling(max_tokens=40), Sampling(temperature=0.8, seed=4, max_tokens=40)]
)
def test_answers_in_bfloat16_are_those_of_plain_decoding(target: Target, sampling: Sampling) -> None:
    prompts = [tuple((7 * i + k) % 90 + 5 for i in range(12)) * 2 for k in range(3)]
    alone = []
    for prompt in prompts:
        request = engines.request("alone", prompt, sampling)
        engines.run(engines.engine(target), [request])
        alone.append(request.output)
    drafter = NgramDrafter()
    together = [engines.request(str(i), prompt, sampling) for i, prompt in enumerate(prompts)]
    machine = engines.engine(target, drafter, Shape(6, 3, 16))
    engines.run(machine, together, apart=2)
    assert [r.output for r in together] == alone
    assert machine.counters.drafted > 0
