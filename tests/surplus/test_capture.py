from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from tiny_report import make_passages

from specdec.errors import CheckpointError, MismatchError, RequestError, SpecdecError, UnsupportedError
from specdec.surplus import rows, shards
from specdec.surplus.capture import (
    CaptureSettings,
    capture,
    check_head,
    documents,
    load_captured,
    load_floor,
    manifest_of,
    target_head,
)
from specdec.surplus.contract import TargetHead
from specdec.surplus.shards import open_directory, shard_path
from specdec.surplus.windows import windowed
from specdec.target.protocol import Target

SETTINGS = CaptureSettings(layers=(1, 4, 6), max_tokens=12, per_shard=4)


def taken(target: Target, work: Path, count: int = 6) -> list[Path]:
    manifest = capture(target, make_passages(count), SETTINGS, work)
    return [shard_path(work, i) for i in range(manifest.shards)]


def test_final_states_give_the_law_that_wrote_the_text(target: Target, work: Path) -> None:
    passages = make_passages(6)
    manifest = capture(target, passages, SETTINGS, work)
    captured = load_captured(work, manifest, target_head(target, 1.0))
    assert captured.taps.shape[1:] == (3, target.info.hidden)
    assert captured.domains == ("maths", "talk")
    floor = load_floor(work, manifest)
    assert floor.numel() > 10
    assert float(floor.max()) < 1e-4  # verify-time and teacher-forced laws agree in float32
    starts = captured.doc.diff(prepend=torch.tensor([-1])) > 0
    prompts = torch.tensor([len(p.prompt) for p in passages])
    assert torch.equal(captured.position[starts], prompts - 1)  # from the last token of each prompt on


def test_documents_keep_their_prompts(target: Target, work: Path) -> None:
    passages = make_passages(5)
    found = list(documents(work, capture(target, passages, SETTINGS, work)))
    assert [d.doc for d in found] == list(range(5))
    for document, passage in zip(found, passages, strict=True):
        assert tuple(document.ids[: len(passage.prompt)].tolist()) == passage.prompt
        assert document.start == len(passage.prompt) - 1


def test_a_second_call_writes_nothing_and_text_does_not_depend_on_the_batch(
    target: Target, work: Path
) -> None:
    paths = taken(target, work)
    before = [path.stat().st_mtime_ns for path in paths]
    taken(target, work)
    assert [path.stat().st_mtime_ns for path in paths] == before
    alone = work.parent / "alone"
    capture(target, make_passages(6), replace(SETTINGS, slots=1), alone)
    for path in paths:
        assert torch.equal(load_file(path)["ids"], load_file(alone / path.name)["ids"])


def test_a_broken_shard_is_written_again(target: Target, work: Path) -> None:
    paths = taken(target, work)
    good = paths[1].read_bytes()
    torn, missing = good[: len(good) // 2], paths[0].read_bytes()
    paths[1].write_bytes(torn)
    paths[0].unlink()
    taken(target, work)
    assert paths[1].read_bytes() == good
    assert paths[0].read_bytes() == missing


def test_an_interruption_costs_at_most_the_shard_it_hit(target: Target, work: Path) -> None:
    passages, told = make_passages(12), list[int]()

    def interrupt(done: int, of: int) -> None:
        told.append(done)
        if len(told) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        capture(target, passages, SETTINGS, work, interrupt)
    kept = sorted(work.glob("shard-*.safetensors"))
    assert len(kept) == 2
    before = [path.stat().st_mtime_ns for path in kept]
    assert capture(target, passages, SETTINGS, work).shards == 3
    assert [path.stat().st_mtime_ns for path in kept] == before  # only the third was written


def test_an_altered_shard_is_noticed(target: Target, work: Path) -> None:
    paths = taken(target, work)
    tensors = load_file(paths[0])
    tensors["ids"][0] += 1
    save_file(tensors, paths[0], metadata={"checksum": "0" * 64})
    manifest = capture(target, make_passages(6), SETTINGS, work)
    assert load_captured(work, manifest, target_head(target, 1.0)).ids.numel()
    paths[0].unlink()
    with pytest.raises(CheckpointError, match=r"shard-00000"):
        load_captured(work, manifest, target_head(target, 1.0))


def test_another_capture_is_refused_by_the_first_field_that_differs(target: Target, work: Path) -> None:
    taken(target, work)
    with pytest.raises(MismatchError, match="temperature"):
        capture(target, make_passages(6), replace(SETTINGS, temperature=0.7), work)
    with pytest.raises(MismatchError, match="passages"):
        capture(target, make_passages(6, seed=1), SETTINGS, work)
    told = manifest_of(target, make_passages(6), SETTINGS)
    narrow = replace(told, target=told.target.replace("float32", "bfloat16"))  # the same weights, rounded
    assert narrow != told
    with pytest.raises(MismatchError, match=r"another run: target is .* not .*bfloat16"):
        open_directory(work, narrow)


def test_bad_input(target: Target, work: Path) -> None:
    with pytest.raises(RequestError, match=r"no such layer.*0 to 8"):
        capture(target, make_passages(2), replace(SETTINGS, layers=(1, 99)), work)
    with pytest.raises(RequestError, match="greedy"):
        replace(SETTINGS, temperature=0.0)
    with pytest.raises(RequestError, match="nothing to capture"):
        capture(target, [], SETTINGS, work)
    with pytest.raises(RequestError, match="do not fit the context"):
        capture(target, make_passages(2), replace(SETTINGS, max_tokens=5000), work)


def test_a_target_with_another_output_map_is_refused() -> None:
    head = TargetHead(torch.randn(20, 8, generator=torch.Generator().manual_seed(0)))
    final = torch.randn(5, 8, generator=torch.Generator().manual_seed(1))
    logits = final @ head.unembedding.T
    check_head(head, final, logits)
    with pytest.raises(UnsupportedError, match="soft cap"):
        check_head(head, final, 3 * torch.tanh(logits / 3))
    with pytest.raises(MismatchError, match="NaN"):
        check_head(head, final * float("nan"), logits)


def test_nan_in_hidden_states_is_refused(target: Target, work: Path) -> None:
    manifest = capture(target, make_passages(6), SETTINGS, work)
    captured = load_captured(work, manifest, target_head(target, 1.0))
    final = captured.final.clone()
    final[3] = float("nan")
    with pytest.raises(MismatchError, match="NaN or infinity"):
        replace(captured, final=final)


def test_a_window_as_long_as_the_text_gives_the_captured_states(target: Target, work: Path) -> None:
    manifest = capture(target, make_passages(2), SETTINGS, work)
    captured = load_captured(work, manifest, target_head(target, 1.0))
    recompute = windowed(target, list(documents(work, manifest)), (4, 6))
    whole = recompute(64)
    torch.testing.assert_close(whole.float(), captured.features((4, 6)).float(), atol=0.06, rtol=0.02)
    short = recompute(1)
    assert not torch.allclose(short.float(), whole.float(), atol=0.06)
    same = captured.ids == captured.ids[5]
    assert same.sum() >= 1
    torch.testing.assert_close(short[same], short[5].expand(int(same.sum()), -1))  # one token is all it saw


def test_a_full_disk_is_told_and_keeps_the_shards_before(
    target: Target, work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[Path] = []

    def full(tensors: dict[str, torch.Tensor], path: Path, metadata: dict[str, str]) -> None:
        path.write_bytes(b"half of it")
        if written:
            raise SafetensorError("I/O error: No space left on device")
        written.append(path)
        save_file(tensors, path, metadata=metadata)

    with monkeypatch.context() as patch, pytest.raises(SpecdecError, match="No space left") as caught:
        patch.setattr(shards, "save_file", full)
        taken(target, work)
    assert caught.value.remedy is not None and "run again" in caught.value.remedy
    assert sorted(path.name for path in work.glob("shard*")) == [shard_path(work, 0).name]
    assert len(taken(target, work)) == 2
    with monkeypatch.context() as patch, pytest.raises(SpecdecError, match="No space left"):
        patch.setattr(rows, "save_file", full)
        rows.save_tensors(work / "rows.safetensors", {"a": torch.ones(1)}, {})
