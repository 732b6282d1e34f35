"""Rows of a data set through ``datasets``: local files, folders, and names on the hub.

``datasets`` is imported when rows are loaded, not before.
"""

import difflib
import re
import tempfile
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Row = dict[str, Any]

# Builders of ``datasets`` by the end of a file's name.
_BUILDERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet"}
# What ``save_to_disk`` leaves in a folder: of a set with splits, and of one without.
_SAVED_SPLITS, _SAVED_ROWS = "dataset_dict.json", "state.json"
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")


class DataError(ValueError):
    """Data that cannot be had or read; the message names key, value and rule."""


@dataclass(frozen=True)
class Source:
    """A part of a data set.

    Attributes:
        key: of the configuration that names the place, such as "task.path".
        path: a JSONL or Parquet file, a folder, or a name on the hub.
        subset: configuration of a data set that has several; None is its only one.
        split_key: of the configuration that names the split.
        split: its name; a file is one split whatever the name.
    """

    key: str
    path: str
    subset: str | None
    split_key: str
    split: str

    @property
    def is_local(self) -> bool:
        return Path(self.path).exists() or not _HUB_NAME.fullmatch(self.path)

    @property
    def is_one_split(self) -> bool:
        """Whether the place holds rows that no split divides."""
        path = Path(self.path)
        return path.is_file() or path.suffix in _BUILDERS or (path / _SAVED_ROWS).is_file()

    def __str__(self) -> str:
        subset = "" if self.subset is None else f", subset {self.subset}"
        return self.path if self.is_one_split else f"{self.path}{subset}, split {self.split}"


def load_rows(source: Source) -> list[Row]:
    """All rows.

    Raises:
        DataError: naming key, value and rule, and how to bring the data where there is none.
    """
    try:
        import datasets
    except ModuleNotFoundError as missing:
        raise DataError(f"{source.key}: {missing}: pip install 'nemo_apo[math]'") from None
    datasets.disable_progress_bars()
    if not source.is_local:
        return _from_hub(source, datasets)
    if not Path(source.path).exists():
        raise DataError(f"{source.key}={source.path}: {how_to_bring(source)}")
    return _from_disk(source, datasets)


def state_of(source: Source) -> str:
    """Whether the data is here: "found", or "missing" and how to bring it."""
    if source.is_local:
        return "found" if Path(source.path).exists() else f"missing ({how_to_bring(source)})"
    try:
        from datasets import config
    except ModuleNotFoundError as missing:
        return f"missing ({missing}: pip install 'nemo_apo[math]')"
    cached = Path(config.HF_DATASETS_CACHE) / source.path.replace("/", "___")
    if cached.is_dir():
        return f"found in the cache {cached}"
    return f"missing in the cache, to be fetched from the hub ({how_to_bring(source)})"


def how_to_bring(source: Source) -> str:
    """What to do for data that is not here."""
    if source.is_local:
        return "there is no such file or folder"
    return (
        "without a network, run 'hf download --repo-type dataset --local-dir FOLDER "
        f"{source.path}' where there is one, copy FOLDER to this machine and set "
        f"{source.key}=FOLDER"
    )


def _from_hub(source: Source, datasets: Any) -> list[Row]:
    try:
        return _split_of(source, datasets.load_dataset(source.path, source.subset))
    except DataError:
        raise
    # No network, no such name, no right to it: the library has an exception for each.
    except Exception as error:
        raise DataError(_not_from_hub(source, error)) from None


def _not_from_hub(source: Source, error: Exception) -> str:
    return (
        f"{source.key}={source.path}: cannot be had from the hub ({_first_line(error)}); "
        f"{how_to_bring(source)}"
    )


def _from_disk(source: Source, datasets: Any) -> list[Row]:
    path = Path(source.path)
    try:
        if (path / _SAVED_SPLITS).is_file():
            return _split_of(source, datasets.load_from_disk(path))
        if (path / _SAVED_ROWS).is_file():
            return datasets.load_from_disk(path).to_list()
        return _from_files(source, datasets.load_dataset)
    except DataError:
        raise
    # Whatever a damaged file makes the library raise.
    except Exception as error:
        raise DataError(_unreadable(source, error)) from None


def _unreadable(source: Source, error: Exception) -> str:
    return f"{source.key}={source.path}: cannot be read: {_first_line(error.__cause__ or error)}"


def _from_files(source: Source, load_dataset: Callable[..., Any]) -> list[Row]:
    """Rows of one file or of a folder of files, none of which is left in the library's cache.

    A cache that is keyed by path and time could hand out the rows of a file that was since changed.
    """
    path = Path(source.path)
    with tempfile.TemporaryDirectory(prefix="nemo_apo_data_") as cache:
        if path.is_dir():
            loaded = load_dataset(source.path, source.subset, cache_dir=cache, keep_in_memory=True)
            return _split_of(source, loaded)
        if path.suffix not in _BUILDERS:
            rule = f"must be a folder or end in {', '.join(_BUILDERS)}"
            raise DataError(f"{source.key}={source.path}: {rule}")
        loaded = load_dataset(
            _BUILDERS[path.suffix],
            data_files={"rows": source.path},
            cache_dir=cache,
            keep_in_memory=True,
        )
        return loaded["rows"].to_list()


def _split_of(source: Source, splits: Any) -> list[Row]:
    if source.split not in splits:
        raise DataError(
            f"{source.split_key}={source.split}: {source.path} has no such split, it has "
            f"{', '.join(splits)}{suggestion(source.split, list(splits))}"
        )
    return splits[source.split].to_list()


def suggestion(wrong: str, choices: Collection[str]) -> str:
    """The end of a message that names the nearest choice; empty if none is near."""
    near = difflib.get_close_matches(wrong, choices, n=1)
    return f"; did you mean {near[0]}?" if near else ""


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
