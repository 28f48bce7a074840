"""A checkpoint's tensors handed out one at a time, so that the file is never resident as a whole.

A mapped file's pages stay resident as long as any tensor of the mapping lives; here each tensor gets a
mapping of its own. Knows files and shapes, not models.
"""

from __future__ import annotations

from pathlib import Path

from safetensors import safe_open
from torch import Tensor

from specdec.target.files import load_state
from specdec.target.shards import shards


class Source:
    """The tensors of a directory.

    Attributes:
        shapes: of every tensor, by name.

    Raises:
        CheckpointError: for broken or absent files, see `load_state`.
    """

    def __init__(self, directory: Path) -> None:
        mapped = load_state(directory)  # reads headers only, and checks them
        self.shapes = {name: tuple(tensor.shape) for name, tensor in mapped.items()}
        self._home: dict[str, Path] = {}
        for shard in shards(directory):
            if shard.name.endswith(".safetensors"):
                with safe_open(directory / shard.name, framework="pt") as file:
                    self._home |= dict.fromkeys(file.keys(), directory / shard.name)
        self._held = {name: tensor for name, tensor in mapped.items() if name not in self._home}  # pickles

    def take(self, name: str) -> Tensor:
        """A tensor, mapped; a pickle's can be taken once."""
        tensor = self.peek(name)
        self._held.pop(name, None)
        return tensor

    def peek(self, name: str) -> Tensor:
        """A tensor, mapped, to be taken later."""
        if name in self._held:
            return self._held[name]
        with safe_open(self._home[name], framework="pt") as file:
            tensor: Tensor = file.get_tensor(name)
        return tensor
