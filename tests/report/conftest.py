"""Run folders of synthetic numbers: they are made up, plausible in shape, and measure nothing."""

import json
import math
import random
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from nemo_apo import record
from nemo_apo.record import Summary

WriteRun = Callable[..., Path]
Step = tuple[int, dict[str, Any], list[dict[str, str]]]


def synthetic_line(step: int, steps: int, gain: float, noise: random.Random) -> dict[str, Any]:
    """A line of ``metrics.jsonl`` after ``step`` of ``steps`` RL steps."""
    done = step / steps
    learned = gain * (1 - math.exp(-3 * done))
    jitter = noise.gauss(0, 0.02)
    line: dict[str, Any] = {record.STEP: step, record.FINDINGS: []}
    if step % 10 == 0 or step == steps:
        line[record.EVAL_ACCURACY] = min(1.0, 0.26 + 0.66 * learned)
        line[record.EVAL_REWARD] = min(1.0, 0.40 + 0.53 * learned)
        line[record.EVAL_PASS_AT_K] = min(1.0, 0.55 + 0.41 * learned)
    if step == 0:
        return line
    confidence = 0.8 * done * (1 + 5 * jitter)
    improvement = math.tanh(4 * math.exp(-3 * done) * gain) * (0.9 + 4 * jitter)
    alpha = 0.9 - 0.5 * gain * done * math.exp(-0.9 * done)
    rollout, logprobs, weigh, refresh, train = 1.1 + jitter, 0.2, 0.02, 0.3, 0.7 - jitter
    line |= {
        record.REWARD_MEAN: 0.35 + 0.5 * learned + jitter,
        record.REWARD_STD: 0.3 - 0.1 * done,
        record.ALPHA: alpha,
        record.ALPHA_TARGET: alpha - 0.05 + jitter,
        record.CONFIDENCE: max(0.0, min(1.0, confidence)),
        record.IMPROVEMENT: max(0.0, min(1.0, improvement)),
        record.TOKEN_ENTROPY: 0.7 * math.exp(-2 * done) + abs(jitter),
        record.ANCHOR_DRIFT: 0.3 + 0.2 * done + jitter,
        record.ESS_SHARE: 0.7 - 0.2 * done + jitter,
        record.KL_REFERENCE: 0.05 * learned + abs(jitter) / 10,
        record.MAX_LOG_RATIO: 2 + abs(40 * jitter),
        record.CLIPPED_SHARE: abs(jitter),
        record.GRAD_NORM: 0.8 + abs(10 * jitter),
        record.COEFFICIENT_TOP_SHARE: 0.3 + 0.2 * done + jitter,
        record.RESPONSE_LENGTH: 7 + 3 * jitter,
        record.TRUNCATED_SHARE: 0.02 * (1 - done),
        record.TOKENS_PER_SECOND: 1500 + 2000 * jitter,
        record.NO_SIGNAL_SHARE: 0.2 + 0.3 * done,
        record.ROLLOUT_SECONDS: rollout,
        record.LOGPROB_SECONDS: logprobs,
        record.WEIGH_SECONDS: weigh,
        record.REFRESH_SECONDS: refresh,
        record.TRAIN_SECONDS: train,
        record.STEP_SECONDS: 1.05 * (rollout + logprobs + weigh + refresh + train),
        record.SAMPLES: step * 256,
    }
    if 0.5 < done < 0.75:
        line[record.FINDINGS].append(
            {
                "name": "no signal",
                "message": "41% of the groups have equal rewards",
                "advice": "filter such groups, or resample them from other prompts",
            }
        )
    return line


def synthetic_summary(name: str, lines: list[dict[str, Any]]) -> Summary:
    """The summary that belongs to ``lines``."""
    alphas = [line[record.ALPHA] for line in lines if record.ALPHA in line]
    return Summary(
        name=name,
        objective="apo",
        schedule="guarded",
        task="sort",
        reward="exact",
        seed=1,
        accuracy_start=lines[0][record.EVAL_ACCURACY],
        accuracy_final=lines[-1][record.EVAL_ACCURACY],
        reward_start=lines[0][record.EVAL_REWARD],
        reward_final=lines[-1][record.EVAL_REWARD],
        pass_at_8=lines[-1][record.EVAL_PASS_AT_K],
        pass_k=8,
        pass_at_k=lines[-1][record.EVAL_PASS_AT_K],
        steps=len(lines) - 1,
        samples=(len(lines) - 1) * 256,
        optimizer_steps=(len(lines) - 1) * 8,
        skipped_steps=0,
        wall_s=214.0,
        warm_start_s=9.5,
        peak_memory_mib=812.0,
        alpha_first=alphas[0],
        alpha_last=alphas[-1],
        alpha_lowest=min(alphas),
        confidence_highest=0.8,
        improvement_highest=0.9,
        refresh_share=0.12,
        world_size=4,
        tensor_model_parallel_size=2,
        pipeline_model_parallel_size=1,
        context_parallel_size=1,
        data_parallel_size=2,
        versions={"torch": "2.0.0", "megatron-core": "0.1.0"},
    )


def write_synthetic_run(
    folder: Path,
    *,
    name: str = "synthetic",
    steps: int = 20,
    gain: float = 1.0,
    seed: int = 0,
    finished: bool = True,
    config: str = "objective:\n  name: apo\n  beta_r: 0.3\nseed: 1\n",
    change: Callable[[list[dict[str, Any]]], None] | None = None,
) -> Path:
    """Write a run folder; ``change`` may edit the lines of its metrics first."""
    noise = random.Random(seed)
    lines = [synthetic_line(step, steps, gain, noise) for step in range(steps + 1)]
    summary = synthetic_summary(name, lines)
    if change:
        change(lines)
    folder.mkdir(parents=True)
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / record.METRICS_FILE).write_text(text, encoding="utf-8")
    (folder / record.CONFIG_FILE).write_text(config, encoding="utf-8")
    if finished:
        (folder / record.SUMMARY_FILE).write_text(json.dumps(asdict(summary)), encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def write_run() -> WriteRun:
    """``write_synthetic_run``."""
    return write_synthetic_run


@pytest.fixture
def synthetic_steps() -> Callable[[int], list[Step]]:
    """(step, metrics, findings) of a run of so many steps, as the live view gets them."""

    def steps_of(steps: int) -> list[Step]:
        noise = random.Random(0)
        lines = [synthetic_line(step, steps, 1.0, noise) for step in range(steps + 1)]
        return [(line.pop(record.STEP), line, line.pop(record.FINDINGS)) for line in lines]

    return steps_of
