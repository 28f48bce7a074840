"""The page's script in Node: what it sends when a conversation is left in the middle of an answer."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import pytest

import specdec.server

PAGE = Path(specdec.server.__file__).with_name("page.html")


@pytest.mark.skipif(shutil.which("node") is None, reason="no Node")
def test_a_new_conversation_knows_nothing_of_the_one_before() -> None:
    command = ["node", str(Path(__file__).with_name("page.mjs")), str(PAGE)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    first, second, third = json.loads(done.stdout)
    assert [m["content"] for m in first] == ["first"]
    assert [m["content"] for m in second] == ["second"]
    assert [m["content"] for m in third] == ["second", "OLD", "third"]
