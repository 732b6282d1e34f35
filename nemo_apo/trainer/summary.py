"""``summary.json``: the figures of a finished run, drawn from its metrics."""

import json
from dataclasses import asdict
from pathlib import Path

from nemo_apo import record
from nemo_apo.config import Config
from nemo_apo.parallel.layout import Layout
from nemo_apo.record import Summary
from nemo_apo.trainer.checkpoint import TrainerState
from nemo_apo.trainer.durable_files import replace_text


def summarize(
    folder: Path,
    config: Config,
    state: TrainerState,
    layout: Layout,
    *,
    wall_s: float,
    peak_memory_mib: float,
    versions: dict[str, str],
) -> Summary:
    """The summary of a run that has reached its last step (rank 0)."""
    lines = _lines(folder)
    last = lines[-1]
    alphas = _column(lines, record.ALPHA)
    train_s = sum(_column(lines, record.STEP_SECONDS))
    pass_at_k = last[record.EVAL_PASS_AT_K]
    return Summary(
        name=config.run.name,
        objective=config.objective.name,
        schedule=config.schedule.name if config.objective.uses_alpha else "none",
        task=config.task.name,
        reward=config.task.reward,
        seed=config.run.seed,
        accuracy_start=state.accuracy_start,
        accuracy_final=last[record.EVAL_ACCURACY],
        reward_start=state.reward_start,
        reward_final=last[record.EVAL_REWARD],
        pass_at_8=pass_at_k if config.evaluation.pass_k == 8 else None,
        pass_k=config.evaluation.pass_k,
        pass_at_k=pass_at_k,
        steps=state.step,
        samples=state.samples,
        optimizer_steps=state.optimizer_steps,
        skipped_steps=state.skipped_steps,
        wall_s=wall_s,
        warm_start_s=state.warm_start_s,
        peak_memory_mib=peak_memory_mib,
        alpha_first=alphas[0] if alphas else None,
        alpha_last=alphas[-1] if alphas else None,
        alpha_lowest=min(alphas, default=None),
        confidence_highest=max(_column(lines, record.CONFIDENCE), default=None),
        improvement_highest=max(_column(lines, record.IMPROVEMENT), default=None),
        refresh_share=sum(_column(lines, record.REFRESH_SECONDS)) / train_s,
        world_size=layout.world_size,
        tensor_model_parallel_size=layout.tensor_size,
        pipeline_model_parallel_size=layout.pipeline_size,
        context_parallel_size=layout.context_size,
        data_parallel_size=layout.data_size,
        versions=versions,
    )


def write_summary(folder: Path, summary: Summary) -> None:
    """Write ``summary.json``."""
    text = json.dumps(asdict(summary), indent=1) + "\n"
    replace_text(folder / record.SUMMARY_FILE, text)


def _lines(folder: Path) -> list[dict]:
    text = (folder / record.METRICS_FILE).read_text()
    return [json.loads(line) for line in text.splitlines()]


def _column(lines: list[dict], name: str) -> list[float]:
    return [line[name] for line in lines if line.get(name) is not None]
