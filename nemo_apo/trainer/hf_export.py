"""A run's weights as a folder that transformers loads, by one process on its CPU.

The checkpoint is read as the whole model, whatever layout wrote it. The folder is prepared under a
hidden name, written out to disk and renamed once.
"""

import shutil
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

from megatron.core.models.gpt import GPTModel
from torch.distributed.checkpoint import CheckpointException

from nemo_apo import record
from nemo_apo.compose.hf_model import decoder_of
from nemo_apo.compose.schema import typed_section
from nemo_apo.config import ConfigError, ModelConfig, ParallelConfig, padded_vocab_size
from nemo_apo.hf_checkpoint.decoder import Decoder, UnfitCheckpoint
from nemo_apo.hf_checkpoint.export import (
    MAX_SHARD_BYTES,
    config_content,
    copy_along,
    write_config,
    write_weights,
)
from nemo_apo.parallel import layout as parallel_layout
from nemo_apo.parallel.layout import Layout
from nemo_apo.parallel.together import RankError
from nemo_apo.trainer.checkpoint import ORIGIN, STATE_FILE, state_content
from nemo_apo.trainer.checkpoint_search import newest_verified, verify
from nemo_apo.trainer.durable_files import make_partial, publish, settle_file
from nemo_apo.trainer.fixed_config import VOCABULARY
from nemo_apo.trainer.hf_weights import tensors_of
from nemo_apo.trainer.model import build_replica
from nemo_apo.trainer.sealed_folder import MANIFEST_FILE, DamagedFolder
from nemo_apo.trainer.shard_files import read_shards

_MODEL = "model."


@dataclass(frozen=True)
class Exported:
    """What an export did.

    Attributes:
        checkpoint: the folder that was read.
        step: RL steps that its weights have been trained.
        files: names of the files written.
    """

    checkpoint: Path
    step: int
    files: tuple[str, ...]


@dataclass(frozen=True)
class _Source:
    """A verified checkpoint and what its state file says of the model."""

    folder: Path
    step: int
    model: ModelConfig
    vocabulary: int
    origin: Path | None

    @property
    def decoder(self) -> Decoder:
        return decoder_of(self.model, self.vocabulary)


def export(
    source: Path,
    target: Path,
    dtype: str | None = None,
    origin: Path | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> Exported:
    """Write the weights of a run, or of one of its checkpoints, in Hugging Face's format.

    Args:
        source: a run's folder, whose newest whole checkpoint is taken, or a checkpoint's.
        target: a folder that does not exist.
        dtype: "float32", "bfloat16" or "float16"; None is that of the training weights.
        origin: the folder of the checkpoint that training started from, if it is not where
            ``model.path`` said; configuration and tokenizer come from there.
        max_shard_bytes: of a file of weights.

    Raises:
        ConfigError: if the source is no checkpoint or a damaged one, the target exists or cannot
            be written, or the origin is another model. Nothing is left of the target then.
    """
    if target.exists() or target.is_symlink():
        raise ConfigError(f"{target} exists already; nothing is written over it")
    layout = parallel_layout.initialize(ParallelConfig(backend="gloo"), 0)
    try:
        found = _source(source, origin)
        files = _write(found, layout, target, dtype or found.model.params_dtype, max_shard_bytes)
    except (UnfitCheckpoint, OSError) as error:
        raise ConfigError(f"cannot export {source} to {target}: {error}") from None
    finally:
        parallel_layout.shut_down()
    return Exported(found.folder, found.step, tuple(files))


def _source(source: Path, origin: Path | None) -> _Source:
    folder = _checkpoint(source)
    if not (folder / STATE_FILE).is_file():
        raise ConfigError(f"{folder} holds weights alone, and nothing says of which model")
    content = state_content(folder)
    values = content["config"]
    model = typed_section("model", _section(values))
    known = content.get(ORIGIN)
    if origin is None and known is not None:
        origin = Path(known)
        if not origin.is_dir():
            raise ConfigError(
                f"{origin}, where training took its first weights from (model.path), is not there "
                "any more; --origin names where its config.json and tokenizer are now"
            )
    vocabulary = values[VOCABULARY] if model.vocab_size is None else model.vocab_size
    return _Source(folder, content["state"]["step"], model, vocabulary, origin)


def _section(values: dict[str, Any]) -> dict[str, Any]:
    return {
        key.removeprefix(_MODEL): value for key, value in values.items() if key.startswith(_MODEL)
    }


def _checkpoint(source: Path) -> Path:
    """The checkpoint's folder, whose seal holds."""
    if (source / MANIFEST_FILE).is_file():
        try:
            return verify(source).folder
        except DamagedFolder as fault:
            raise ConfigError(f"{source} is damaged: {fault}") from None
    found = newest_verified(source / record.CHECKPOINT_DIR)
    if found is None:
        raise ConfigError(f"{source} is neither a checkpoint nor a run with checkpoints")
    return found.newest.folder


def _write(
    found: _Source, layout: Layout, target: Path, dtype: str, max_shard_bytes: int
) -> list[str]:
    decoder = found.decoder
    # Whatever can be refused is refused before the weights are read.
    content = config_content(decoder, dtype, found.origin)
    module = _whole_model(found, layout)
    partial = make_partial(target.parent, target.name)
    try:
        files = write_weights(partial, decoder, tensors_of(module, decoder), dtype, max_shard_bytes)
        files += write_config(partial, content)
        if found.origin is not None:
            files += copy_along(partial, found.origin)
        for name in files:
            settle_file(partial / name)
        publish(partial, target)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return files


def _whole_model(found: _Source, layout: Layout) -> GPTModel:
    """The model on this process with the checkpoint's weights."""
    padded = padded_vocab_size(found.vocabulary, found.model)
    # Rotary positions need no longest sequence.
    module = build_replica(found.model, layout, padded, 1, 1, initialize=False)
    entries = {"model": module.sharded_state_dict()}
    try:
        loaded = read_shards(found.folder, entries)["model"]
    except (RankError, UnpicklingError, CheckpointException) as error:
        raise ConfigError(f"cannot read {found.folder}: {error}") from error
    module.load_state_dict(loaded)
    return module
