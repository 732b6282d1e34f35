"""Held-out evaluation: what is right, what the figures are made of, and that nothing else moves."""

import math
from collections import Counter
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch

from nemo_apo import record
from nemo_apo.config import Config, EvaluationConfig
from nemo_apo.grading import GradingSettings
from nemo_apo.parallel import layout as parallel_layout
from nemo_apo.tasks import Prompt
from nemo_apo.trainer.engines.interface import Sampling
from nemo_apo.trainer.evaluation import evaluate, figures
from nemo_apo.trainer.examination import Answers, Examination, examine
from nemo_apo.trainer.loop import build_policy
from nemo_apo.trainer.rollouts import Completions
from nemo_apo.trainer.sampler import generate, uniforms
from tests.parallel.ranks import run_ranks

from .tiny_runs import TokenSumTask, begin, bits_equal, parallel, tiny_config

EVALUATION = EvaluationConfig(every=100, prompts=12, pass_prompts=7, pass_k=3)
# Calls the completion a number, and raises where it is none.
NUMBERS = GradingSettings(
    grader="tests.grading.misbehaving:grade", workers=1, wall_s=5.0, total_s=60.0
)


@dataclass(frozen=True)
class OftenSolvedTask(TokenSumTask):
    """A third of what a random policy says is right."""

    def solved(self, prompt: Prompt, completion: list[int]) -> bool:
        return sum(completion) % 3 == 0


def config_of(**sections: Any) -> Config:
    return tiny_config(**{"task": OftenSolvedTask(), "evaluation": EVALUATION, **sections})


def seen_on_this_rank(config: Config) -> Examination:
    layout = parallel_layout.initialize(config.parallel, config.run.seed)
    return examine(build_policy(config, layout), config, config.task)


def test_with_as_many_samples_as_k_the_figures_are_shares_of_the_same_samples() -> None:
    """Drawn here from the policy itself; the values are those of before, to the last bit."""
    config = config_of()

    def work() -> None:
        training = begin(config)
        got = evaluate(training.policy, config, config.task).metrics()
        task, model = config.task, training.policy.stage
        prompts = task.test_prompts(12)
        samples = [prompt for prompt in prompts[:7] for _ in range(3)]
        draws = uniforms(config.run.seed, "pass@k", 21, task.max_response_length)
        temperature = config.rollout.temperature
        sampling = Sampling.of(task, task.vocab_size, temperature, micro_batch_size=16)
        greedy = generate(model, prompts, None, sampling)
        sampled = generate(model, samples, draws, sampling)
        solved = [task.solved(prompt, greedy.row(row)) for row, prompt in enumerate(prompts)]
        hits = [task.solved(prompt, sampled.row(row)) for row, prompt in enumerate(samples)]
        passed = [any(hits[3 * i : 3 * i + 3]) for i in range(7)]
        accuracy = sum(solved) / 12
        assert 0.0 < accuracy < 1.0
        assert 0 < sum(passed) < 7, "the example shows nothing"
        assert got[record.EVAL_ACCURACY] == accuracy
        assert got[record.EVAL_PASS_AT_K] == sum(passed) / 7
        assert got[record.EVAL_SAMPLED_ACCURACY] == pytest.approx(sum(hits) / 21, rel=1e-14)
        error = math.sqrt(accuracy * (1 - accuracy) / 11)
        assert got[record.EVAL_ACCURACY_ERROR] == pytest.approx(error, rel=1e-14)
        assert got[record.EVAL_RESPONSE_LENGTH] == float(greedy.lengths_N.double().mean())
        assert got[record.EVAL_TRUNCATED_SHARE] == float((~greedy.finished_N).double().mean())
        rewards = [task.grade(prompt, greedy.row(row)) for row, prompt in enumerate(prompts)]
        assert got[record.EVAL_REWARD] == pytest.approx(sum(rewards) / 12, rel=1e-14)
        assert got[record.EVAL_FAILED_GRADES] == 0.0
        assert set(got) <= set(record.METRICS)

    run_ranks(1, work)


def test_the_figures_are_the_same_in_every_layout() -> None:
    config = config_of(evaluation=replace(EVALUATION, pass_samples=5))

    def work(tensor: int) -> dict[str, float]:
        return figures(seen_on_this_rank(replace(config, parallel=parallel(tensor, 1)))).metrics()

    (alone,) = run_ranks(1, work, 1)
    assert 0.0 < alone[record.EVAL_PASS_AT_K] < 1.0
    assert run_ranks(2, work, 1) == [alone] * 2
    assert run_ranks(2, work, 2) == [alone] * 2


def test_evaluating_changes_nothing_in_training() -> None:
    config = config_of()

    def work(evaluates: bool) -> list[torch.Tensor]:
        training = begin(config)
        if evaluates:
            evaluate(training.policy, config, config.task)
        training.run(1)
        if evaluates:
            evaluate(training.policy, config, config.task)
        training.run(1)
        return [value.clone() for value in training.policy.copy_weights()]

    (with_it,), (without,) = run_ranks(1, work, True), run_ranks(1, work, False)
    assert bits_equal(with_it, without)


def test_a_graders_value_decides_and_a_grade_that_fails_is_wrong_and_counted() -> None:
    config = config_of(grading=NUMBERS)

    def work() -> Examination:
        return seen_on_this_rank(config)

    one, other = run_ranks(2, work)
    assert (one.greedy.right, one.sampled.right) == (other.greedy.right, other.sampled.right)
    failed: Counter[str] = Counter()
    for answers in (one.greedy, one.sampled):
        for row in range(len(answers.prompts)):
            text = config.task.text(answers.completions.row(row))
            is_number = text.isdigit()
            assert answers.right[row] == is_number
            assert answers.reasons[row] == ("" if is_number else "raised")
            assert math.isnan(answers.rewards[row]) != is_number
            failed.update([] if is_number else ["raised"])
    assert 0 < failed["raised"] < 33, "the example shows nothing"
    told = figures(one)
    assert told.failures == failed
    assert told.metrics()[record.EVAL_FAILED_GRADES] == failed["raised"]
    known = [reward for reward in one.greedy.rewards if not math.isnan(reward)]
    assert told.reward.prompts == len(known) < 12
    assert told.reward.value == pytest.approx(sum(known) / len(known), rel=1e-14)


def answers_of(
    right: list[bool],
    lengths: list[int],
    finished: list[bool],
    votes: list[str | None] | None = None,
) -> Answers:
    count = len(right)
    completions = Completions(
        tokens_NR=torch.zeros(count, 8, dtype=torch.int64),
        lengths_N=torch.tensor(lengths),
        finished_N=torch.tensor(finished),
        logprobs_NR=torch.zeros(count, 8),
        logprob_sums_N=torch.zeros(count, dtype=torch.float64),
    )
    rewards = [0.5 * value for value in right]
    prompts = [Prompt("1", (4,))] * count
    return Answers(prompts, completions, right, rewards, [""] * count, votes or [None] * count)


def test_the_figures_worked_by_hand() -> None:
    """Two prompts with five samples each, k = 3."""
    sampled = answers_of(
        [*(False, True, True, False, False), *(False, True, False, False, False)],
        [*(2, 4, 6, 8, 8), *(1, 1, 1, 1, 6)],
        [*(True, True, True, False, False), *(True, True, True, True, False)],
        # First prompt: b is elected by 2 of the first 3, though a has 3 of 5. Second: nobody but
        # the third votes among the first 3, and is wrong.
        [*("a", "b", "b", "a", "a"), *(None, None, "d", "c", "c")],
    )
    greedy = answers_of([True, False, True, True], [2, 3, 4, 5], [True, True, True, False])
    told = figures(Examination(greedy, sampled, per_prompt=5, k=3))
    assert told.accuracy.value == 0.75
    # Squares: 3 / 16 + 9 / 16 = 3 / 4, over 3 and 4.
    assert told.accuracy.error == pytest.approx(0.25, rel=1e-15)
    assert (told.reward.value, told.response_length.value) == (0.375, 3.5)
    assert told.truncated.value == 0.25
    # Right: 2 of 5 and 1 of 5. pass@3: 1 - C(3,3)/C(5,3) = 9/10 and 1 - C(4,3)/C(5,3) = 6/10.
    assert list(told.pass_at) == [1, 2, 3, 4, 5]
    assert told.pass_at[1].value == pytest.approx(0.3, rel=1e-15)
    assert told.pass_at[3].value == pytest.approx(0.75, rel=1e-15)
    assert told.pass_at[3].error == pytest.approx(0.15, rel=1e-14)
    assert told.pass_at[5].value == 1.0
    assert told.maj_at_k.value == 0.5
    assert told.sampled_length.value == pytest.approx(3.8, rel=1e-15)
    assert told.sampled_truncated.value == pytest.approx(0.3, rel=1e-15)
    assert told.accuracy.prompts == 4
    assert told.maj_at_k.prompts == 2


def test_prompts_without_any_vote_elect_no_right_answer() -> None:
    sampled = answers_of([True, True], [1, 1], [True, True])
    told = figures(Examination(sampled, sampled, per_prompt=2, k=2))
    assert (told.maj_at_k.value, told.pass_at[2].value) == (0.0, 1.0)
    assert math.isnan(told.maj_at_k.error)
