"""The section ``model`` and the checkpoint at ``model.path``: shapes taken over, files checked."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nemo_apo.compose.schema import assigned
from nemo_apo.config import Config, ConfigError, ModelConfig, vocab_size
from nemo_apo.hf_checkpoint.decoder import (
    Decoder,
    UnfitCheckpoint,
    longest_sequence,
    read_decoder,
)

# Stands in conf/model/hf.yaml for what the checkpoint says.
FROM_CHECKPOINT = "???"
_OPTION = "hf"


def with_checkpoint_shapes(values: Mapping[str, Any]) -> dict[str, Any]:
    """The values of the section, those left open filled in from the checkpoint's ``config.json``.

    A checkpoint that is not there is no mistake as long as nothing is left open: a plan needs none,
    and training refuses it (``check_checkpoint``).

    Raises:
        ConfigError: if the checkpoint is unfit, says otherwise than a value, or is not named where
            something is left open.
    """
    path = values.get("path")
    if path is None:
        _refuse_open(values)
        return dict(values)
    if not isinstance(path, str):
        # The schema says what is wrong.
        return dict(values)
    if FROM_CHECKPOINT not in values.values() and not Path(path).exists():
        return dict(values)
    try:
        decoder = read_decoder(Path(path))
    except UnfitCheckpoint as error:
        raise ConfigError(f"model.path={path}: {error}") from None
    filled = dict(values)
    for key, value in dataclasses.asdict(decoder).items():
        given = values.get(key)
        if given is None or given == FROM_CHECKPOINT:
            filled[key] = value
        elif given != value:
            raise ConfigError(
                f"{assigned(f'model.{key}', given)}: the checkpoint model.path={path} has "
                f"{assigned(key, value)} (model={_OPTION} takes over what it has)"
            )
    return filled


def checkpoint_line(config: Config) -> list[str]:
    """As ``Task.check_files``: a line for the checkpoint, none without one."""
    path = config.model.path
    if path is None:
        return []
    if Path(path).exists():
        return [f"{path}: checkpoint, found"]
    bring = "'hf download MODEL --local-dir FOLDER' where there is a network; model.path=FOLDER"
    return [f"{path}: checkpoint, missing ({bring})"]


def _refuse_open(values: Mapping[str, Any]) -> None:
    if FROM_CHECKPOINT in values.values():
        raise ConfigError(
            f"model.path=null: model={_OPTION} needs the folder of a checkpoint in Hugging Face's "
            "format, whose config.json gives the shapes"
        )


def decoder_of(model: ModelConfig, vocabulary: int) -> Decoder:
    """The decoder of a configured model with an unpadded vocabulary."""
    names = [field.name for field in dataclasses.fields(Decoder)]
    values = {name: getattr(model, name) for name in names}
    return Decoder(**{**values, "vocab_size": vocabulary})


def check_checkpoint(config: Config) -> None:
    """Refuse a checkpoint at ``model.path`` that does not hold the model; no weight is read.

    Raises:
        ConfigError: naming file or tensor, and the rule.
    """
    # Composing needs no safetensors.
    from nemo_apo.hf_checkpoint.shards import open_shards

    path, task = config.model.path, config.task
    if path is None:
        return
    try:
        with open_shards(Path(path), decoder_of(config.model, vocab_size(config))):
            longest = longest_sequence(Path(path))
    except UnfitCheckpoint as error:
        raise ConfigError(f"model.path={path}: {error}") from None
    length = task.max_prompt_length + task.max_response_length
    if longest is not None and length > longest:
        raise ConfigError(
            f"model.path={path}: the model was made for {longest} tokens "
            f"(max_position_embeddings), the task's sequences have up to {length}"
        )
