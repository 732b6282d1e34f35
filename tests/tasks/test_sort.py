"""The sort task: rewards by hand, the teacher's habits, a held-out fifth that stays held out."""

import itertools
import subprocess
import sys
from random import Random

import pytest

from nemo_apo.tasks import Prompt, PromptTurn, SortTask
from nemo_apo.tasks.sort import is_held_out

PROMPT = "364134"  # sorted: 133446


def graded_by(reward: str, answer: str, ends: bool = True) -> float:
    task = SortTask(reward=reward)
    prompt = Prompt(PROMPT, tuple(task.encode(PROMPT)))
    return task.grade(prompt, task.encode(answer) + ([task.end_id] if ends else []))


@pytest.mark.parametrize(
    ("reward", "answer", "wanted"),
    [
        ("exact", "133446", 1.0),
        ("exact", "13446", 0.0),
        ("exact", "644331", 0.0),
        ("exact", "1334466", 0.0),
        ("exact", "", 0.0),
        # 0.9 x share of the six digits in place + 0.1 for six digits.
        ("graded", "133446", 1.0),
        ("graded", "133464", 0.9 * 4 / 6 + 0.1),
        ("graded", "13446", 0.9 * 3 / 6),
        ("graded", "1334466", 0.9),
        ("graded", "222222", 0.1),
        ("graded", "", 0.0),
        ("two_modes", "133446", 1.0),
        ("two_modes", "644331", 0.8),
        ("two_modes", "133464", 0.0),
    ],
)
def test_rewards_by_hand(reward: str, answer: str, wanted: float) -> None:
    assert graded_by(reward, answer) == pytest.approx(wanted)


@pytest.mark.parametrize("reward", ["exact", "graded", "two_modes"])
def test_an_answer_without_end_is_worth_nothing(reward: str) -> None:
    assert graded_by(reward, "133446", ends=False) == 0.0


def test_other_tokens_are_no_answer() -> None:
    task = SortTask(reward="graded")
    prompt = Prompt(PROMPT, tuple(task.encode(PROMPT)))
    right = [*task.encode("133446"), task.end_id]
    for stray in (task.pad_id, task.end_id, 2):
        assert task.grade(prompt, [stray, *right]) == 0.0
        assert task.grade(prompt, [*right, stray]) == 0.0
    assert task.grade(prompt, []) == 0.0


def test_solved_means_ascending_under_every_reward() -> None:
    for reward in ("exact", "graded", "two_modes"):
        task = SortTask(reward=reward)
        prompt = Prompt(PROMPT, tuple(task.encode(PROMPT)))
        assert task.solved(prompt, [*task.encode("133446"), task.end_id])
        assert not task.solved(prompt, [*task.encode("644331"), task.end_id])
        assert not task.solved(prompt, task.encode("133446"))


def test_the_teacher_drops_half_of_the_repeated_digits_and_nothing_else() -> None:
    task = SortTask()
    repeats = kept = 0
    for prompt, completion in task.demonstrations(2000, Random(0)):
        answer = task.answer(completion)
        assert answer is not None
        assert list(answer) == sorted(answer)
        assert set(answer) == set(prompt.text), "a digit that did not repeat was dropped"
        repeats += len(prompt.text) - len(set(prompt.text))
        kept += len(answer) - len(set(answer))
    # About 3000 repeats: the standard deviation of the share is 0.009.
    assert repeats > 2500
    assert kept / repeats == pytest.approx(0.5, abs=0.04)


@pytest.mark.parametrize("drop", [0.0, 1.0])
def test_the_teacher_at_the_ends_of_its_range(drop: float) -> None:
    task = SortTask(teacher_drop=drop)
    for prompt, completion in task.demonstrations(200, Random(1)):
        wanted = sorted(prompt.text) if drop == 0.0 else sorted(set(prompt.text))
        assert task.answer(completion) == "".join(wanted)


def test_the_two_modes_teacher_answers_in_descending_order_most_of_the_time() -> None:
    task = SortTask(reward="two_modes", teacher_drop=0.0)
    examples = task.demonstrations(2000, Random(2))
    answers = [task.answer(completion) for _, completion in examples]
    ascending = ["".join(sorted(prompt.text)) for prompt, _ in examples]
    for answer, up in zip(answers, ascending, strict=True):
        assert answer in (up, up[::-1])
    down = sum(answer != up for answer, up in zip(answers, ascending, strict=True))
    assert down / len(answers) == pytest.approx(0.75, abs=0.04)
    for reward in ("exact", "graded"):
        task = SortTask(reward=reward, teacher_drop=0.0)
        for prompt, completion in task.demonstrations(100, Random(3)):
            assert task.answer(completion) == "".join(sorted(prompt.text))


def test_a_fifth_is_held_out_and_never_trained_on() -> None:
    every = [
        f"{a}{b}{c}{d}"
        for a in range(1, 10)
        for b in range(1, 10)
        for c in range(1, 10)
        for d in range(1, 10)
    ]
    held_out = {digits for digits in every if is_held_out(digits)}
    assert len(held_out) / len(every) == pytest.approx(0.2, abs=0.02)
    task = SortTask(length=4)
    train = {prompt.text for prompt in task.train_prompts(3000, PromptTurn(0, 0))}
    taught = {prompt.text for prompt, _ in task.demonstrations(1000, Random(1))}
    test = {prompt.text for prompt in task.test_prompts(1000)}
    assert test <= held_out
    assert not (train | taught) & held_out


def test_the_split_is_the_same_in_every_process() -> None:
    """Python's own ``hash`` of a string is not."""
    program = (
        "from nemo_apo.tasks import SortTask\n"
        "print(' '.join(p.text for p in SortTask().test_prompts(20)))"
    )
    wanted = " ".join(prompt.text for prompt in SortTask().test_prompts(20))
    for seed in ("1", "2"):
        done = subprocess.run(
            [sys.executable, "-c", program],
            capture_output=True,
            text=True,
            check=True,
            env={"PYTHONHASHSEED": seed, "PYTHONPATH": ":".join(filter(None, sys.path))},
        )
        assert done.stdout.strip() == wanted


def test_data_is_a_function_of_the_seed() -> None:
    task = SortTask()
    assert task.demonstrations(20, Random("a")) == task.demonstrations(20, Random("a"))
    assert task.demonstrations(20, Random("a")) != task.demonstrations(20, Random("b"))
    turns = [PromptTurn(*numbers) for numbers in itertools.product((0, 1), repeat=3)]
    drawn = [tuple(task.train_prompts(20, turn)) for turn in turns]
    assert drawn == [tuple(task.train_prompts(20, turn)) for turn in turns]
    assert len(set(drawn)) == len(turns)
    # More held-out prompts are the same ones first: figures of different sizes stay comparable.
    assert task.test_prompts(30)[:10] == task.test_prompts(10)


@pytest.mark.parametrize(
    ("turn", "digits"),
    [
        (PromptTurn(seed=0, step=0), ["233697", "889368", "511694"]),
        (PromptTurn(seed=7, step=3, again=1), ["619476", "516768", "454329"]),
    ],
)
def test_the_prompts_of_a_turn_never_change(turn: PromptTurn, digits: list[str]) -> None:
    """Figures of earlier runs are of these prompts."""
    assert [prompt.text for prompt in SortTask().train_prompts(3, turn)] == digits


def test_lengths_bound_what_is_generated() -> None:
    task = SortTask(length=9, teacher_drop=0.0)
    for prompt, completion in task.demonstrations(50, Random(0)):
        assert len(prompt.tokens) <= task.max_prompt_length
        assert len(completion) <= task.max_response_length
        assert max(*prompt.tokens, *completion) < task.vocab_size


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"reward": "beauty"}, "task.reward"),
        ({"length": 1}, "task.length"),
        ({"teacher_drop": 1.5}, "task.teacher_drop"),
        ({"descending_share": -0.1}, "task.descending_share"),
    ],
)
def test_a_bad_value_is_refused_by_name(change: dict, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        SortTask(**change)


def test_tokens_of_a_model_beyond_the_digits_are_no_answer() -> None:
    task = SortTask(length=2)
    prompt = task.test_prompts(1)[0]
    right = [*task.encode(task.reference(prompt))]
    assert task.solved(prompt, [*right, task.end_id])
    for wrong in (task.vocab_size, 151_935):
        completion = [right[0], wrong, task.end_id]
        assert task.text(completion)[1] == "?"
        assert (task.grade(prompt, completion), task.solved(prompt, completion)) == (0.0, False)
