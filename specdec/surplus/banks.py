"""Control banks fitted once per text: controls never see h, so every tap set, probe size and noise level shares them.

Knows keys and banks; how one is fitted comes in as a callable.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from specdec.surplus.contract import Contexts
from specdec.surplus.control import Bank, TableSettings
from specdec.surplus.shards import checksum


class Banks:
    """The banks of one text and one choice of label symbols.

    >>> shelf, bank = Banks(), Bank((), ())
    >>> shelf.get("k=2", lambda: bank) is shelf.get("k=2", lambda: Bank((), ())) is bank
    True
    """

    def __init__(self) -> None:
        self._kept: dict[str, Bank] = {}

    def get(self, key: str, make: Callable[[], Bank]) -> Bank:
        """The bank under `key`, made at the first call."""
        if key not in self._kept:
            self._kept[key] = make()
        return self._kept[key]


def bank_key(train: Contexts, val: Contexts, table: TableSettings, symbols: int) -> str:
    """Tells apart whatever a bank depends on besides text and label symbols."""
    rows = checksum({"train": train.at, "val": val.at, "depth": torch.tensor(train.depth)})
    return f"{rows} {table} {symbols}"
