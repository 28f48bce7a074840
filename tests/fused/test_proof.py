"""The copy engine's products are tried by another process first, and what ends that one does not end this one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from specdec.fused import cuts, proof, trial

DEVICE = torch.device("cuda", 0)
FAULTS = {
    "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)": "ended with -11",
    f"import sys; print('an illegal memory access', file=sys.stderr); sys.exit({proof.FAULT})": "illegal memory access",
    "import time; time.sleep(60)": "did not end",
}

OTHERS = {
    "class OutOfMemoryError(Exception): pass\nraise OutOfMemoryError": "OutOfMemoryError",
    "import os, signal; os.kill(os.getpid(), signal.SIGKILL)": "ended with -9",  # as by a system short of memory
}


@pytest.fixture(autouse=True)
def device(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """One that nothing is known of yet."""
    pytest.importorskip("triton")
    monkeypatch.setenv("SPECDEC_CACHE", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "a device")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    monkeypatch.setattr(proof, "SECONDS", 5.0)
    proof.copies_proven.cache_clear()


def ask(monkeypatch: pytest.MonkeyPatch, program: str) -> bool:
    """In a process that has not asked yet."""
    monkeypatch.setattr(proof, "PROGRAM", ("-c", program))
    proof.copies_proven.cache_clear()
    return proof.copies_proven(DEVICE)


def test_what_ran_to_its_end_is_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    assert ask(monkeypatch, "")
    assert ask(monkeypatch, "raise SystemExit(1)"), "asked again"


@pytest.mark.parametrize("program", FAULTS)
def test_a_fault_leaves_them_out_for_good(program: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(proof, "SECONDS", 1.0 if "sleep" in program else 30.0)
    with pytest.warns(UserWarning, match=FAULTS[program]):
        assert not ask(monkeypatch, program)
    assert not ask(monkeypatch, ""), "asked again"
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "another device")
    assert ask(monkeypatch, "")


@pytest.mark.parametrize("program", OTHERS)
def test_what_could_not_be_tried_is_tried_again(program: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.warns(UserWarning, match=OTHERS[program]):
        assert not ask(monkeypatch, program)
    assert ask(monkeypatch, "")


def test_the_current_device_is_the_one_without_a_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    monkeypatch.setattr(proof, "PROGRAM", ("-c", "import sys; sys.exit(int(sys.argv[1]))"))
    assert proof._tried_by_another(torch.device("cuda"))[0] == 3
    assert proof._tried_by_another(torch.device("cuda", 2))[0] == 2


@pytest.mark.parametrize("works", [True, False])
def test_a_trial_leaves_out_what_is_not_proven(works: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trial, "copies_proven", lambda _: works)
    tried: list[cuts.Cut] = []
    monkeypatch.setattr(trial.Trial, "of", lambda kind, weight=None: None)
    monkeypatch.setattr(trial, "_fastest", lambda _, cuts: tried.extend(cuts))
    for kind in proof.samples(DEVICE):
        tried.clear()
        trial._tried(kind, torch.empty(0))
        assert any(cut.tma for cut in tried) == works
        assert not all(cut.tma for cut in tried)


def test_the_samples_have_every_way_of_fetching() -> None:
    shapes = {(cut.out * (2 if kind.paired else 1), cut.into, cut.stages)
              for kind in proof.samples(DEVICE) for cut in cuts.candidates(kind) if cut.tma}  # fmt: skip
    assert shapes >= {(tile.lines, tile.into, tile.stages) for tile in cuts.LARGE if tile.tma}
    assert any(
        cut.ahead == kind.inputs for kind in proof.samples(DEVICE) for cut in cuts.candidates(kind) if cut.tma
    )


def test_the_module_is_a_program(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a device it says so, and is not taken for a fault."""
    if torch.cuda.is_available():
        pytest.skip("there is a device")
    monkeypatch.setattr(proof, "SECONDS", 120.0)
    with pytest.warns(UserWarning, match="(?i)cuda|nvidia"):
        assert not proof.copies_proven(DEVICE)
    assert not list(proof.cache_root().rglob("*.json"))


@pytest.mark.parametrize("fault", [None, "CUDA error: an illegal memory access was encountered"])
def test_the_program_ends_at_a_fault(
    fault: str | None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Not at a cut that does not launch, as here all do not."""

    def wait() -> None:
        if fault:
            raise RuntimeError(fault + "\nmore")

    kind = cuts.Kind(1536, 576, torch.bfloat16, torch.device("cpu"), False, False, True, 16)
    monkeypatch.setattr(proof, "samples", lambda _: [kind])
    monkeypatch.setattr(torch.cuda, "set_device", lambda _: None)
    monkeypatch.setattr(torch.cuda, "synchronize", wait)
    assert proof.main(0) == (proof.FAULT if fault else 0)
    assert capsys.readouterr().err.endswith(fault or "")


@pytest.mark.gpu
def test_a_gpu_proves_them(monkeypatch: pytest.MonkeyPatch) -> None:
    if not torch.cuda.is_available() or torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("no device with a copy engine")
    assert proof.main(0) == 0
