from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny_report import make_passages

from specdec.attention.reference import ReferenceAttention
from specdec.drafting.eagle import EagleDrafter
from specdec.drafting.protocol import Context, Shape
from specdec.errors import RequestError
from specdec.head.model import DraftHead
from specdec.surplus.capture import CaptureSettings, Document, capture, documents, target_head
from specdec.surplus.draft import HeadReader, ReadSettings, draft_lumping, gather
from specdec.surplus.estimate import TOPS
from specdec.surplus.forecasts import align
from specdec.surplus.rounds import sampled_chain
from specdec.target.protocol import Target

TAPS = (1, 4, 6)


def captured(target: Target, work: Path, count: int = 3) -> list[Document]:
    settings = CaptureSettings(layers=TAPS, max_tokens=14)
    return list(documents(work, capture(target, make_passages(count), settings, work)))


def reader(target: Target, head: DraftHead, depths: int = 3, temperature: float = 1.0) -> HeadReader:
    return HeadReader(head, target.embed, target_head(target, temperature), ReadSettings((0, 1, 2), depths))


@torch.inference_mode()
def test_the_unroll_is_the_drafter_at_every_depth(target: Target, head: DraftHead, work: Path) -> None:
    """Draft a chain at a row, put its tokens into the text: the reader's log q are the drafter's own."""
    document = captured(target, work, 1)[0]
    length, depths = document.start + 5, 3
    drafter = EagleDrafter(head, target.embed, ReferenceAttention(), 1, 64)
    features = document.taps[:length].flatten(1).to(head.dtype)
    root = int(document.ids[length])
    drafter.admit(0, document.ids[:length], features, root)
    context = Context(torch.tensor([0]), torch.tensor([root]), torch.tensor([length]))
    tree = drafter.propose(context, Shape(depths, 1, depths + 1))
    assert tree.scores is not None
    steps = tree.scores[0].diff()

    ids = torch.cat([document.ids[: length + 1], tree.tokens[0, 1:]])
    extra = torch.zeros(depths + 1, *document.taps.shape[1:], dtype=document.taps.dtype)
    drafted = replace(document, ids=ids, taps=torch.cat([document.taps[:length], extra]))
    outputs = reader(target, head, depths)._unroll(drafted)
    for j, y in enumerate(outputs, start=1):
        log_q = head.logits(y[length - 1]).float().log_softmax(-1)
        token = (head.ids == tree.tokens[0, j]).nonzero()[0, 0]
        torch.testing.assert_close(log_q[token], steps[j - 1], atol=2e-4, rtol=1e-4)


def test_rows_obey_what_must_hold(target: Target, head: DraftHead, work: Path) -> None:
    texts = captured(target, work)
    first, parts = 0, []
    for document in texts:
        parts.append(reader(target, head).read(document, first))
        first += document.ids.shape[0] - document.start
    rows = gather(parts)
    assert sorted(rows) == [2, 3, 4]
    for found in rows.values():
        assert (found.scores.alpha <= found.coverage + 1e-5).all()
        assert (found.scores.top <= found.scores.ideal + 1e-5).all()
        torch.testing.assert_close(found.masses.cumsum(1)[:, [m - 1 for m in TOPS]], found.scores.top)
    torch.testing.assert_close(rows[2].fresh_gap, rows[2].scores.gap)  # depth 1 has true features anyway
    assert not torch.allclose(rows[3].fresh_gap, rows[3].scores.gap)
    domain = torch.zeros(first, dtype=torch.int64)
    aligned = align(rows, domain)
    assert all(torch.equal(d.scores.at, aligned.depths[0].scores.at) for d in aligned.depths)
    assert aligned.rounds("sampled chain", ()).tau >= aligned.rounds("chain", ()).tau * 0.5


@pytest.mark.parametrize("rows", range(1, 8))
def test_a_document_may_have_few_rows(rows: int, target: Target, head: DraftHead, work: Path) -> None:
    """Of an answer shorter than the draft is deep, or than one row in some is kept."""
    document = captured(target, work, 1)[0]
    end = document.start + rows
    short = replace(document, ids=document.ids[:end], taps=document.taps[:end], final=document.final[:end])
    read = reader(target, head, depths=6).read(short, 0)
    assert [len(found.scores.alpha) for found in read] == list(range(rows - 1, max(rows - 7, 0), -1))


def test_block_verification_keeps_at_least_what_the_token_rule_keeps(
    target: Target, head: DraftHead, work: Path
) -> None:
    first, parts = 0, []
    for document in captured(target, work):
        parts.append(reader(target, head).read(document, first))
        first += document.ids.shape[0] - document.start
    aligned = align(gather(parts), torch.zeros(first, dtype=torch.int64))
    block = sampled_chain(aligned.depths)[0]
    token = torch.stack([d.log_ratio.double().clamp_max(0) for d in aligned.depths], 1).cumsum(1).exp()
    assert (block >= token - 1e-9).all()
    torch.testing.assert_close(block[:, 0], token[:, 0])


def test_labels_are_tokens_the_head_can_draft() -> None:
    weight = torch.tensor([5.0, 1.0, 4.0, 3.0, 0.0, 2.0])
    lumping = draft_lumping(torch.tensor([1, 2, 3, 5]), weight, keep=10)
    assert lumping.kept.tolist() == [2, 3]  # the heaviest half: the tail stays within the head's reach
    with pytest.raises(RequestError, match="covers no token"):
        draft_lumping(torch.tensor([4]), weight, keep=2)
