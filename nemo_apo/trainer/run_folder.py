"""The folder of a run: what it may hold at the start, and how it is made ready."""

import shutil
from collections.abc import Callable
from pathlib import Path

from nemo_apo import record
from nemo_apo.compose import to_yaml
from nemo_apo.compose.hf_model import check_checkpoint
from nemo_apo.config import Config, ConfigError, require
from nemo_apo.parallel.together import RankError, Result, on_first
from nemo_apo.trainer.checkpoint_search import checkpoint_folders
from nemo_apo.trainer.durable_files import make_folders, replace_text

_FILES = (
    record.CONFIG_FILE,
    record.METRICS_FILE,
    record.SAMPLES_FILE,
    record.SUMMARY_FILE,
    record.REPORT_HTML,
    record.REPORT_PNG,
)
_FOLDERS = (record.TENSORBOARD_DIR, record.CHECKPOINT_DIR)


class TrainingStopped(RuntimeError):
    """Training cannot go on; the message says why."""


def check_folder(folder: Path, if_exists: str) -> None:
    """Refuse a folder that holds a run; every rank looks before any of them writes."""
    holds_run = any((folder / name).exists() for name in (*_FILES, *_FOLDERS))
    if holds_run and if_exists == "error":
        raise ConfigError(
            f"run.name={folder.name}: {folder} already holds a run; choose another run.name, or "
            "run.if_exists=overwrite or run.if_exists=resume"
        )
    no_checkpoint = not checkpoint_folders(folder / record.CHECKPOINT_DIR)
    if if_exists == "resume" and (folder / record.METRICS_FILE).exists() and no_checkpoint:
        raise ConfigError(
            f"run.if_exists=resume: {folder} holds a run but no checkpoint of it (run.save_every); "
            "choose run.if_exists=overwrite, or another run.name"
        )


def check_weights(folder: Path, config: Config) -> None:
    """Refuse weights to start from that are unfit, or that overwriting the run would remove."""
    load = config.warm_start.load
    if load is None:
        # A checkpoint of the run holds all weights that it needs.
        resumes = config.run.if_exists == "resume"
        if not (resumes and checkpoint_folders(folder / record.CHECKPOINT_DIR)):
            check_checkpoint(config)
        return
    require(Path(load).is_dir(), "warm_start.load", load, "there is no such folder")
    inside = folder.resolve() in Path(load).resolve().parents
    rule = f"lies in {folder}, which run.if_exists=overwrite would remove"
    require(not (inside and config.run.if_exists == "overwrite"), "warm_start.load", load, rule)


def on_first_or_stop(work: Callable[[], Result]) -> Result:
    """Work of rank 0 alone, a full disk among its dangers, whose failure stops all ranks."""
    try:
        return on_first(work)
    except RankError as error:
        raise TrainingStopped(str(error)) from error


def prepare_folder(folder: Path, config: Config) -> None:
    """Make the folder, empty it of an old run where told to, save the configuration; collective."""

    def prepare() -> None:
        if config.run.if_exists == "overwrite":
            _remove_run(folder)
        make_folders(folder)
        # A resumed run replaces its configuration once the checkpoint has accepted the new one.
        if not (folder / record.METRICS_FILE).exists():
            replace_text(folder / record.CONFIG_FILE, to_yaml(config))

    on_first_or_stop(prepare)


def _remove_run(folder: Path) -> None:
    for name in _FILES:
        (folder / name).unlink(missing_ok=True)
    for name in _FOLDERS:
        shutil.rmtree(folder / name, ignore_errors=True)
