"""Servers to measure: ours and vLLM's, each a process of its own on a free port, ended with the bench.

Knows their command lines and how to tell that they listen; nothing of what is asked of them.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from bench.load import System
from specdec.errors import SpecdecError
from specdec.head.pretrained import shipped_head
from specdec.target.files import resolve

KINDS = ("specdec", "plain", "vllm", "vllm-plain")
VLLM_ENV = Path("~/.cache/specdec/vllm-env").expanduser()
LENGTH = 4096  # context of vLLM: what ours takes when nothing is said

PATIENCE = 900.0  # seconds until a server must listen: the first start measures costs or compiles
DRAIN = 120.0  # seconds it gets to end


@dataclass(frozen=True, slots=True)
class Server:
    """A running server."""

    url: str
    process: subprocess.Popen[bytes]

    def stop(self) -> int:
        """SIGTERM, then wait; the exit code."""
        self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(DRAIN)
        except subprocess.TimeoutExpired:
            self.process.kill()
            return self.process.wait()


@dataclass(frozen=True, slots=True)
class Setup:
    """What servers of every kind are started with.

    Attributes:
        target: as `specdec serve` takes it; vLLM gets its directory.
        draft: of our server.
        dtype, slots: of every server.
        vllm_env: environment that scripts/conformance builds.
        head: vLLM's draft head, None takes the shipped one; `chain` drafts a round.
    """

    target: str = "smollm2-135m"
    draft: str = "auto"
    dtype: str = "auto"
    slots: int = 16
    vllm_env: Path = VLLM_ENV
    head: Path | None = None
    chain: int = 3


def command(kind: str, setup: Setup) -> tuple[tuple[str, ...], dict[str, str]]:
    """The command line of a server, to which the port is added, and what its environment needs.

    Raises:
        SpecdecError: vLLM is not there, or no head ships for the target and none is named.
    """
    if kind in ("specdec", "plain"):
        drafting = ("--plain",) if kind == "plain" else ("--draft", setup.draft)
        return (sys.executable, "-m", "specdec.cli.main", "serve", setup.target, *drafting,
                "--slots", str(setup.slots), "--dtype", setup.dtype), {}  # fmt: skip
    python = setup.vllm_env / "bin" / "python"
    if not python.is_file():
        raise SpecdecError("is not there", field="vllm-env", value=str(setup.vllm_env),
                           remedy="Build it with scripts/conformance vllm.")  # fmt: skip
    flags = ("--served-model-name", setup.target, "--dtype", setup.dtype, "--max-num-seqs", str(setup.slots),
             "--max-model-len", str(LENGTH), "--no-enable-log-requests")  # fmt: skip
    drafts = ("--speculative-config", json.dumps(_chain(setup))) if kind == "vllm" else ()
    # not `vllm serve`: that program asks for the metadata of a package that is called otherwise on CPUs
    return (str(python), "-m", "vllm.entrypoints.openai.api_server", "--model",
            str(resolve(setup.target).directory), *flags, *drafts), vllm_needs(setup.vllm_env)  # fmt: skip


def vllm_needs(environment: Path) -> dict[str, str]:
    """What vLLM is given to be as fast as it can: every core (by itself it leaves one to its front), Intel's OpenMP
    where its environment has it (its own advice for drafts)."""
    cores = ",".join(map(str, sorted(os.sched_getaffinity(0))))
    needs = {"VLLM_CPU_KVCACHE_SPACE": "2", "HF_HUB_OFFLINE": "1", "PYTHONSAFEPATH": "1",
             "VLLM_CPU_OMP_THREADS_BIND": cores}  # fmt: skip
    library = environment / "lib" / "libiomp5.so"
    if library.is_file():
        needs["LD_PRELOAD"] = str(library.resolve())
    return needs


def _chain(setup: Setup) -> dict[str, Any]:
    head = setup.head or shipped_head(setup.target)
    if head is None:
        raise SpecdecError("none ships for the target", field="head", value=setup.target)
    return {"method": "eagle3", "model": str(head.resolve()), "num_speculative_tokens": setup.chain}


def systems_at(kind: str, url: str) -> list[System]:
    """How a server is asked: ours with and without speculation, others as they are.

    Raises:
        SpecdecError: no OpenAI-compatible server answers there.
    """
    try:
        model = str(httpx.get(f"{url}/v1/models", timeout=10).json()["data"][0]["id"])
    except (httpx.HTTPError, ValueError, LookupError) as error:
        raise SpecdecError(f"no OpenAI-compatible server answers: {error}", field="url", value=url) from None
    if kind == "specdec":
        return [System("specdec", url, model), System("same server, plain", url, model, plain=True)]
    return [System(kind, url, model)]


@contextmanager
def running(command: Sequence[str], more: Mapping[str, str] | None = None) -> Iterator[Server]:
    """A server while the block lasts; it has answered /health.

    Raises:
        SpecdecError: it ended or did not answer; the end of its log is told.
    """
    port = _free_port()
    with tempfile.TemporaryFile() as log:
        whole = [*command, "--port", str(port)]
        process = subprocess.Popen(whole, stdout=log, stderr=log, env={**os.environ, **(more or {})})
        server = Server(f"http://127.0.0.1:{port}", process)
        try:
            if not _answers(server):
                log.seek(0)
                raise SpecdecError("did not start", field="server", value=" ".join(whole),
                                   remedy=f"It said: {log.read()[-2000:].decode(errors='replace')}")  # fmt: skip
            yield server
        finally:
            if process.poll() is None:
                server.stop()


def _answers(server: Server) -> bool:
    """Wait for /health; False when the process ends or patience does."""
    until = time.monotonic() + PATIENCE
    while server.process.poll() is None and time.monotonic() < until:
        with contextlib.suppress(httpx.HTTPError):
            if httpx.get(f"{server.url}/health", timeout=5).status_code == 200:
                return True
        time.sleep(0.2)
    return False


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])
