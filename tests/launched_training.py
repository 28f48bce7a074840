"""`specdec train` as one process of a launch; every process says on stdout what it trains on."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from specdec.cli.main import main
from training import run
from training.material import Texts
from training.texts import digest_of

go_on = run.train_on


def train_on(texts: Texts, *rest: Any) -> Path:
    sys.stdout.write(f"texts {digest_of(texts.train)}\n")
    sys.stdout.flush()
    return go_on(texts, *rest)


if __name__ == "__main__":
    run.train_on = train_on
    sys.exit(main(["train", *sys.argv[1:]]))
