"""An evaluation for a person (a table), for a program (JSON), and completion by completion."""

import dataclasses
import json
import math
from collections.abc import Iterator, Mapping
from typing import Any

from nemo_apo.config import Config
from nemo_apo.report.formats import count_text, duration_text, number_text
from nemo_apo.trainer.evaluated_weights import Evaluated
from nemo_apo.trainer.evaluation import Evaluation, Figure
from nemo_apo.trainer.examination import Answers, Examination
from nemo_apo.versions import versions_of

_DISTRIBUTIONS = ("torch", "megatron-core")


def table(config: Config, evaluated: Evaluated) -> str:
    """What was evaluated, and every figure with its standard error."""
    seen, figures = evaluated.seen, evaluated.figures
    step = "" if evaluated.step is None else f", RL step {evaluated.step}"
    lines = [
        f"{evaluated.source}{step}",
        f"task {config.task.name}, graded by {config.grading.grader}: "
        f"{count_text(len(seen.greedy.prompts))} held-out prompts greedily, "
        f"{count_text(figures.maj_at_k.prompts)} of them by {seen.per_prompt} samples "
        f"at temperature {config.rollout.temperature:g}",
        f"{evaluated.layout.sizes}, {duration_text(evaluated.seconds)}",
        "",
        _row("", "value", "std. error", "prompts"),
    ]
    lines += [
        _row(label, number_text(f.value), number_text(f.error), count_text(f.prompts))
        for label, f in _labelled(figures).items()
    ]
    failed = ", ".join(f"{count} {reason}" for reason, count in sorted(figures.failures.items()))
    return "\n".join([*lines, "", f"failed grades, counted as wrong: {failed or 'none'}"])


def _labelled(figures: Evaluation) -> dict[str, Figure]:
    return {
        "greedy accuracy": figures.accuracy,
        "greedy reward": figures.reward,
        "greedy length, tokens": figures.response_length,
        "greedy truncated share": figures.truncated,
        **{f"pass@{k}": figure for k, figure in figures.pass_at.items()},
        f"maj@{figures.k}": figures.maj_at_k,
        "sampled length, tokens": figures.sampled_length,
        "sampled truncated share": figures.sampled_truncated,
    }


def _row(label: str, value: str, error: str, prompts: str) -> str:
    return f"{label:<24}{value:>10}{error:>12}{prompts:>10}"


def as_json(config: Config, evaluated: Evaluated) -> str:
    """The same as JSON; a number that is not finite becomes null."""
    figures, layout = evaluated.figures, evaluated.layout
    content = {
        "weights": evaluated.source,
        "step": evaluated.step,
        "task": dataclasses.asdict(config.task),  # type: ignore[call-overload]
        "grader": config.grading.grader,
        "seed": config.run.seed,
        "temperature": config.rollout.temperature,
        "samples_per_prompt": evaluated.seen.per_prompt,
        "k": figures.k,
        "figures": {
            "accuracy": _figure(figures.accuracy),
            "reward": _figure(figures.reward),
            "response_length": _figure(figures.response_length),
            "truncated_share": _figure(figures.truncated),
            "pass_at": {str(k): _figure(figure) for k, figure in figures.pass_at.items()},
            "maj_at_k": _figure(figures.maj_at_k),
            "sampled_length": _figure(figures.sampled_length),
            "sampled_truncated_share": _figure(figures.sampled_truncated),
        },
        "failed_grades": figures.failures,
        "ranks": {"world_size": layout.world_size, "layout": layout.sizes},
        "seconds": evaluated.seconds,
        "versions": versions_of(_DISTRIBUTIONS),
    }
    return json.dumps(content, indent=1, allow_nan=False) + "\n"


def _figure(figure: Figure) -> Mapping[str, float | None]:
    return {
        "value": _finite(figure.value),
        "standard_error": _finite(figure.error),
        "prompts": figure.prompts,
    }


def sample_lines(config: Config, seen: Examination) -> Iterator[str]:
    """One line of JSON per completion, greedy ones first; those of a prompt stand together."""
    yield from _lines(config, seen.greedy, 1, is_greedy=True)
    yield from _lines(config, seen.sampled, seen.per_prompt, is_greedy=False)


def _lines(config: Config, answers: Answers, per_prompt: int, is_greedy: bool) -> Iterator[str]:
    task, completions = config.task, answers.completions
    for row, prompt in enumerate(answers.prompts):
        reason = answers.reasons[row]
        line: dict[str, Any] = {
            "prompt_number": row // per_prompt,
            "sample": None if is_greedy else row % per_prompt,
            "prompt": prompt.text,
            "reference": task.reference(prompt),
            "completion": task.text(completions.row(row)),
            "tokens": int(completions.lengths_N[row]),
            "truncated": not bool(completions.finished_N[row]),
            "answer": answers.votes[row],
            "correct": answers.right[row],
            "reward": _finite(answers.rewards[row]) if answers.rewards else None,
            "failure": reason or None,
        }
        yield json.dumps(line, ensure_ascii=False) + "\n"


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
