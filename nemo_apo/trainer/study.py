"""A study: the same task under several objectives and schedules, several seeds, equal samples.

Every run of a seed starts from the same warm-started weights, so that differences are those of
the RL phase. Runs are processes of their own, a few at a time; a run whose summary already exists
is not repeated, so an interrupted study goes on where it stopped.
"""

import hashlib
import json
import multiprocessing
import statistics
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, replace
from pathlib import Path

from nemo_apo import record
from nemo_apo.compose import compose
from nemo_apo.config import Config
from nemo_apo.core.objectives import OBJECTIVES
from nemo_apo.trainer.fixed_config import meaning

# Settings of every run of a study, none of which changes what is learnt: nothing on the screen,
# evaluation at start and end only, larger micro-batches and no monitoring for speed.
_QUIET = (
    "run.console=off",
    "run.report=false",
    "run.tensorboard=false",
    "run.save_every=0",
    "run.if_exists=overwrite",
    "run.threads=1",
    "evaluation.every=1000000",
    "update.micro_batch_size=128",
    "update.monitor_reference_kl=false",
)
_ALPHAS = (1.0, 0.9, 0.6, 0.35, 0.0)

OBJECTIVE_ROWS: dict[str, tuple[str, ...]] = {
    ("apo, guarded" if name == "apo" else name): (f"objective={name}",) for name in OBJECTIVES
}
SCHEDULE_ROWS: dict[str, tuple[str, ...]] = {
    "apo, ess": ("schedule=ess",),
    **{f"apo, alpha {a:g}": ("schedule=fixed", f"schedule.alpha={a}") for a in _ALPHAS},
}


@dataclass(frozen=True)
class Study:
    """One table: a reward of the sort task, the rows to compare and the number of seeds."""

    reward: str
    rows: dict[str, tuple[str, ...]]
    seeds: int


STUDIES: dict[str, Study] = {
    "exact": Study("exact", OBJECTIVE_ROWS, 3),
    "graded": Study("graded", {**OBJECTIVE_ROWS, **SCHEDULE_ROWS}, 3),
    "two_modes": Study("two_modes", {**OBJECTIVE_ROWS, **SCHEDULE_ROWS}, 5),
}


@dataclass(frozen=True)
class RowResult:
    """Mean and population standard deviation over the seeds of a row.

    Attributes:
        label: the row.
        runs: number of finished runs.
        start, accuracy, reward, pass_at_k: held-out figures, each (mean, standard deviation).
        alpha_last: mean of the last alphas, None where there is no alpha.
    """

    label: str
    runs: int
    start: tuple[float, float]
    accuracy: tuple[float, float]
    reward: tuple[float, float]
    pass_at_k: tuple[float, float]
    alpha_last: float | None


def run_study(study: Study, root: Path, overrides: Sequence[str], jobs: int) -> None:
    """Run what is missing of a study, ``jobs`` processes at a time."""
    pending = [
        config
        for seed in range(study.seeds)
        for label in study.rows
        if not _is_finished(config := _config(study, label, seed, root, overrides))
    ]
    warm = {_warm_folder(config): config for config in pending}
    _in_processes(_make_warm_start, list(warm.values()), jobs)
    _in_processes(_train, pending, jobs)


def results(study: Study, root: Path, overrides: Sequence[str]) -> list[RowResult]:
    """The rows of a study for which at least one run has finished, in order."""
    rows = []
    for label in study.rows:
        summaries = []
        for seed in range(study.seeds):
            config = _config(study, label, seed, root, overrides)
            if _is_finished(config):
                path = _run_folder(config) / record.SUMMARY_FILE
                summaries.append(json.loads(path.read_text()))
        if summaries:
            rows.append(_row(label, summaries))
    return rows


def _row(label: str, summaries: list[dict]) -> RowResult:
    def figure(name: str) -> tuple[float, float]:
        values = [summary[name] for summary in summaries]
        return statistics.fmean(values), statistics.pstdev(values)

    alphas = [s["alpha_last"] for s in summaries if s["alpha_last"] is not None]
    return RowResult(
        label=label,
        runs=len(summaries),
        start=figure("accuracy_start"),
        accuracy=figure("accuracy_final"),
        reward=figure("reward_final"),
        pass_at_k=figure("pass_at_k"),
        alpha_last=statistics.fmean(alphas) if alphas else None,
    )


def _config(study: Study, label: str, seed: int, root: Path, overrides: Sequence[str]) -> Config:
    name = f"{study.reward}_{label.replace(', ', '_').replace(' ', '_')}_seed{seed}"
    config = compose(
        [
            *_QUIET,
            f"task.reward={study.reward}",
            *study.rows[label],
            f"run.seed={seed}",
            f"run.name={name}",
            *overrides,
        ]
    )
    return replace(config, run=replace(config.run, root=str(root)))


def _run_folder(config: Config) -> Path:
    return Path(config.run.root) / config.run.name


def _is_finished(config: Config) -> bool:
    """Whether the run is there, with the very settings that decide what it learns."""
    folder = _run_folder(config)
    if not (folder / record.SUMMARY_FILE).exists():
        return False
    done = compose([], folder / record.CONFIG_FILE)
    return _learning_sections(done) == _learning_sections(config)


def _learning_sections(config: Config) -> tuple[object, ...]:
    """Everything but where the run is written, its warm start was kept, what it monitored, and
    the limits of its graders."""
    steps_and_seed = (config.run.steps, config.run.seed)
    warm_start = replace(config.warm_start, load=None)
    update = replace(config.update, monitor_reference_kl=False)
    apart = ("run", "warm_start", "update")
    rest = [meaning(name, value) for name, value in vars(config).items() if name not in apart]
    return (steps_and_seed, warm_start, update, *rest)


def _warm_folder(config: Config) -> Path:
    # "exact" and "graded" differ in the reward only; their teacher is the same.
    teacher = "two_modes" if config.task.reward == "two_modes" else "exact"
    decides = repr((replace(config.task, reward=teacher), config.model, config.warm_start))
    key = hashlib.sha256(decides.encode()).hexdigest()[:8]
    return Path(config.run.root) / "warm_start" / f"{teacher}_{key}_seed{config.run.seed}"


def _in_processes(work: Callable[[Config], str], configs: list[Config], jobs: int) -> None:
    # Imported before the fork, so that no worker spends seconds on it again.
    import nemo_apo.trainer.loop  # noqa: F401

    context = multiprocessing.get_context("fork")
    with ProcessPoolExecutor(jobs, mp_context=context) as pool:
        running = [pool.submit(work, config) for config in configs]
        for done, finished in enumerate(as_completed(running), start=1):
            print(f"{done}/{len(configs)} {finished.result()}", flush=True)


def _make_warm_start(config: Config) -> str:
    from nemo_apo.parallel import layout as parallel_layout
    from nemo_apo.trainer import checkpoint
    from nemo_apo.trainer.loop import build_policy, set_threads
    from nemo_apo.trainer.warm_start import run_warm_start

    folder = _warm_folder(config)
    if folder.exists():
        return f"{folder} (kept)"
    set_threads(config.run)
    layout = parallel_layout.initialize(config.parallel, config.run.seed)
    policy = build_policy(config, layout)
    run_warm_start(policy, config, config.task, lambda done, loss: None)
    checkpoint.save_weights(folder, policy)
    parallel_layout.shut_down()
    return str(folder)


def _train(config: Config) -> str:
    from nemo_apo.trainer.loop import run

    warm_start = replace(config.warm_start, load=str(_warm_folder(config)))
    run(replace(config, warm_start=warm_start))
    return config.run.name
