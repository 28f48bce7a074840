"""A config.json as transformers reads it, so that we cannot read it otherwise.

Old spellings are brought up to date, and what is left out gets the default of its family: another than ours would go
unnoticed, since the self-test sees whether trees are right, not whether the model is. Loads no weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import CONFIG_MAPPING, PretrainedConfig

from specdec.errors import CheckpointError, UnsupportedError

FOREIGN = "Code that comes with a model is not run."
NEWER = "A newer transformers may know it."


def stated_config(config: Mapping[str, Any]) -> PretrainedConfig:
    """
    Raises:
        UnsupportedError: transformers does not know the family, or it is an encoder-decoder.
        CheckpointError: telling the field that it does not accept.
    """
    family = config.get("model_type")
    if not isinstance(family, str) or family not in CONFIG_MAPPING:
        raise UnsupportedError("no family that transformers knows", field="model_type in config.json", value=family,
                               remedy=FOREIGN if "auto_map" in config else NEWER)  # fmt: skip
    try:
        stated: PretrainedConfig = CONFIG_MAPPING[family].from_dict(dict(config))
    except Exception as error:  # its validators raise what they like
        raise CheckpointError(f"is refused by transformers: {' '.join(str(error).split())}",
                              field="config.json") from error  # fmt: skip
    if stated.is_encoder_decoder:
        raise UnsupportedError("is an encoder-decoder, which cannot be a target", field="model_type in config.json",
                               value=family, remedy="Use a model that is all decoder.")  # fmt: skip
    return stated
