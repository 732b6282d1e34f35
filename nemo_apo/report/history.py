"""Reads a run folder into a typed object.

The folder is what ``nemo_apo.record`` describes. A run may be unfinished: ``summary.json`` is
then missing, and a last line of ``metrics.jsonl`` that the killed process left half-written is
skipped and counted. Everything else that is malformed is an error that names the file and line.
"""

import dataclasses
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemo_apo.record import (
    CONFIG_FILE,
    EVAL_ACCURACY,
    FINDINGS,
    METRICS_FILE,
    SAMPLES_FILE,
    STEP,
    SUMMARY_FILE,
    KeptGroup,
    Summary,
)
from nemo_apo.report.formats import printable
from nemo_apo.report.samples import read_samples


class RunFolderError(ValueError):
    """A run folder that is missing, incomplete or malformed."""


@dataclass(frozen=True)
class Finding:
    """A failure signature that was active at a step."""

    name: str
    message: str
    advice: str


@dataclass(frozen=True)
class Record:
    """One line of ``metrics.jsonl``.

    Attributes:
        step: RL steps completed when it was written.
        values: metric name to number; None is a number that was not finite.
        findings: the findings that were active.
    """

    step: int
    values: dict[str, float | None]
    findings: tuple[Finding, ...]


@dataclass(frozen=True)
class FindingSpan:
    """When one finding was active over a run; message and advice are those of its last step."""

    name: str
    message: str
    advice: str
    steps: tuple[int, ...]


@dataclass(frozen=True)
class Run:
    """A run folder.

    Attributes:
        folder: where it was read from.
        label: its name for a person; different for every run of one report.
        records: one per step, by increasing step.
        summary: None while the run is unfinished.
        config: the resolved configuration.
        config_text: the same, as it stands in the file.
        truncated_lines: half-written last lines of metrics that were skipped (0 or 1).
        samples: groups whose completions were kept, in the order of steps.
    """

    folder: Path
    label: str
    records: tuple[Record, ...]
    summary: Summary | None
    config: dict[str, Any]
    config_text: str
    truncated_lines: int
    samples: tuple[KeptGroup, ...] = ()

    def series(self, metric: str) -> tuple[list[int], list[float | None]]:
        """Steps at which ``metric`` was written, and its values (None where not finite)."""
        records = [record for record in self.records if metric in record.values]
        return [r.step for r in records], [r.values[metric] for r in records]

    def finite(self, metric: str) -> list[float]:
        """The finite values of ``metric`` in order of steps; empty if it was never computed."""
        return [value for value in self.series(metric)[1] if value is not None]

    def first(self, metric: str) -> float | None:
        """The first finite value of ``metric``."""
        return next(iter(self.finite(metric)), None)

    def last(self, metric: str) -> float | None:
        """The last finite value of ``metric``."""
        return next(reversed(self.finite(metric)), None)

    def mean(self, metric: str) -> float | None:
        """The mean of the finite values of ``metric``."""
        values = self.finite(metric)
        return math.fsum(values) / len(values) if values else None

    @property
    def steps(self) -> int:
        """RL steps completed."""
        return self.records[-1].step if self.records else 0

    @property
    def evaluated(self) -> bool:
        """Whether any held-out evaluation was written."""
        return bool(self.finite(EVAL_ACCURACY))

    def finding_spans(self) -> list[FindingSpan]:
        """Every finding that was ever active, by the step at which it first was."""
        steps: dict[str, list[int]] = {}
        latest: dict[str, Finding] = {}
        for record in self.records:
            for finding in record.findings:
                active = steps.setdefault(finding.name, [])
                if record.step not in active[-1:]:
                    active.append(record.step)
                latest[finding.name] = finding
        return [
            FindingSpan(name, latest[name].message, latest[name].advice, tuple(active))
            for name, active in steps.items()
        ]


def read_run(folder: Path) -> Run:
    """Read one run folder.

    Raises:
        RunFolderError: if the folder, ``metrics.jsonl`` or ``config.yaml`` is missing, or a file
            is malformed.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise RunFolderError(f"no run folder at {folder}")
    records, truncated_lines = _read_records(folder / METRICS_FILE)
    summary = _read_summary(folder / SUMMARY_FILE)
    config, config_text = _read_config(folder / CONFIG_FILE)
    name = summary.name if summary else folder.resolve().name
    return Run(
        folder=folder,
        label=printable(name) or "run",
        records=records,
        summary=summary,
        config=config,
        config_text=config_text,
        truncated_lines=truncated_lines,
        samples=_read_samples(folder),
    )


def _read_samples(folder: Path) -> tuple[KeptGroup, ...]:
    try:
        return read_samples(folder / SAMPLES_FILE)
    except ValueError as error:
        raise RunFolderError(str(error)) from error


def read_runs(folders: Sequence[Path]) -> list[Run]:
    """Read several run folders; runs of the same name get labels that tell them apart.

    Raises:
        RunFolderError: if ``folders`` is empty or one of them cannot be read.
    """
    if not folders:
        raise RunFolderError("a report needs at least one run folder, got none")
    return _with_distinct_labels([read_run(folder) for folder in folders])


def _with_distinct_labels(runs: list[Run]) -> list[Run]:
    labels = [run.label for run in runs]
    if len(set(labels)) < len(labels):
        labels = [
            run.label if labels.count(run.label) == 1 else _label_with_folder(run) for run in runs
        ]
    if len(set(labels)) < len(labels):
        labels = [f"{label} #{i}" for i, label in enumerate(labels, start=1)]
    return [dataclasses.replace(run, label=label) for run, label in zip(runs, labels, strict=True)]


def _label_with_folder(run: Run) -> str:
    folder = printable(run.folder.resolve().name)
    return run.label if folder == run.label else f"{run.label} ({folder})"


def _read_bytes(path: Path) -> bytes:
    if not path.is_file():
        raise RunFolderError(f"{path.parent} is not a run folder: it has no {path.name}")
    return path.read_bytes()


def _read_records(path: Path) -> tuple[tuple[Record, ...], int]:
    """The records of ``metrics.jsonl`` and the number of truncated lines skipped."""
    lines = _read_bytes(path).split(b"\n")
    unterminated = lines.pop()
    by_step: dict[int, Record] = {}
    for number, line in enumerate(lines, start=1):
        if line.strip():
            _add_record(by_step, _parse_record(line, path, number))
    if not unterminated.strip():
        return tuple(by_step.values()), 0
    try:
        decoded = _decode_json(unterminated)
    except ValueError:
        return tuple(by_step.values()), 1
    _add_record(by_step, _typed_record(decoded, path, len(lines) + 1))
    return tuple(by_step.values()), 0


def _add_record(by_step: dict[int, Record], record: Record) -> None:
    """Append a record; one that goes back in steps comes from a resumed run.

    It then replaces the later steps, and of its own step the metrics that it holds (a resumed run
    may repeat the evaluation of the step it resumes from).
    """
    while by_step and (last := next(reversed(by_step))) > record.step:
        del by_step[last]
    if record.step in by_step:
        earlier = by_step[record.step]
        findings = record.findings or earlier.findings
        record = Record(record.step, {**earlier.values, **record.values}, findings)
    by_step[record.step] = record


def _decode_json(data: bytes) -> Any:
    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is not JSON; a number that is not finite is written as null")

    return json.loads(data.decode("utf-8"), parse_constant=refuse)


def _parse_record(line: bytes, path: Path, number: int) -> Record:
    try:
        decoded = _decode_json(line)
    except ValueError as error:
        raise RunFolderError(f"{path}, line {number}: not valid JSON: {error}") from error
    return _typed_record(decoded, path, number)


def _typed_record(decoded: Any, path: Path, number: int) -> Record:
    where = f"{path}, line {number}"
    if not isinstance(decoded, dict):
        raise RunFolderError(f"{where}: expected a JSON object, got {type(decoded).__name__}")
    step = decoded.get(STEP)
    if not isinstance(step, int) or isinstance(step, bool) or step < 0:
        raise RunFolderError(f'{where}: "{STEP}" must be a whole number >= 0, got {step!r}')
    values = {key: value for key, value in decoded.items() if key not in (STEP, FINDINGS)}
    for key, value in values.items():
        if not _is_number_or_null(value):
            raise RunFolderError(f'{where}: "{key}" must be a number or null, got {value!r}')
    return Record(step, values, tuple(_findings(decoded.get(FINDINGS, []), where)))


def _findings(decoded: Any, where: str) -> Iterator[Finding]:
    if not isinstance(decoded, list):
        raise RunFolderError(f'{where}: "{FINDINGS}" must be a list, got {decoded!r}')
    names = [field.name for field in dataclasses.fields(Finding)]
    for item in decoded:
        if not isinstance(item, dict) or not all(isinstance(item.get(n), str) for n in names):
            raise RunFolderError(f"{where}: a finding needs the texts {names}, got {item!r}")
        yield Finding(*(item[name] for name in names))


def _read_summary(path: Path) -> Summary | None:
    if not path.is_file():
        return None
    try:
        decoded = _decode_json(path.read_bytes())
    except json.JSONDecodeError as error:
        raise RunFolderError(f"{path}, line {error.lineno}: not valid JSON: {error}") from error
    except ValueError as error:
        raise RunFolderError(f"{path}: {error}") from error
    if not isinstance(decoded, dict):
        raise RunFolderError(f"{path}: expected a JSON object, got {type(decoded).__name__}")
    return _typed_summary(decoded, path)


def _typed_summary(decoded: dict[str, Any], path: Path) -> Summary:
    types = {field.name: field.type for field in dataclasses.fields(Summary)}
    missing, unknown = sorted(types.keys() - decoded), sorted(decoded.keys() - types)
    if missing or unknown:
        raise RunFolderError(f"{path}: missing fields {missing}, unknown fields {unknown}")
    for name, kind in types.items():
        if not _fits(decoded[name], kind):
            raise RunFolderError(f'{path}: "{name}" has the wrong type: {decoded[name]!r}')
    return Summary(**decoded)


def _fits(value: Any, kind: Any) -> bool:
    """Whether a JSON value may stand in a field; a float that was not finite is null."""
    if kind is str:
        return isinstance(value, str)
    if kind is int:
        return _is_int(value)
    if kind in (float, float | None):
        return _is_number_or_null(value)
    assert kind == dict[str, str], f"summary field of unknown type {kind}"
    return isinstance(value, dict) and all(isinstance(v, str) for v in value.values())


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number_or_null(value: Any) -> bool:
    return value is None or _is_int(value) or (isinstance(value, float) and math.isfinite(value))


def _read_config(path: Path) -> tuple[dict[str, Any], str]:
    import yaml  # type: ignore[import-untyped]
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        text = _read_bytes(path).decode("utf-8")
        config: Any = OmegaConf.to_container(OmegaConf.create(text), resolve=True)
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise RunFolderError(f"{path}, line {line}: not valid YAML: {error.problem}") from error
    except (UnicodeDecodeError, yaml.YAMLError, OmegaConfBaseException) as error:
        raise RunFolderError(f"{path}: {error}") from error
    if not isinstance(config, dict):
        raise RunFolderError(f"{path}: expected a mapping, got {type(config).__name__}")
    return config, text
