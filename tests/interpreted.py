"""Runs a test file's cases in Triton's interpreter: triton reads that wish when it is imported, so in a process of its
own, once per file."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from typing import Any

import pytest

TROUBLE = "only 0-dimensional arrays"  # what the interpreter of triton 3.6 says under numpy >= 2.4


def tell(cases: Mapping[str, Callable[[], object]]) -> None:
    """In that process: what each case finds, as JSON."""
    found: dict[str, object] = {}
    for name, case in cases.items():
        try:
            found[name] = case()
        except Exception as error:
            if TROUBLE not in str(error):
                raise
            found[name] = TROUBLE
    sys.stdout.write(json.dumps(found))


def told(file: str, name: str) -> Any:
    """What a case of the file found; skips where triton, or an interpreter that works, is not there."""
    pytest.importorskip("triton")
    found = _all(file)[name]
    if found == TROUBLE:
        pytest.skip("this triton's interpreter does not work with this numpy")
    return found


@functools.cache
def _all(file: str) -> dict[str, Any]:
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-W", "ignore", file]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found
