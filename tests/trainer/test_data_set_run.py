"""Training on a data set through a chat template, graded as mathematics in workers."""

import json
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("datasets", reason="the math extra comes with requirements/test.txt")
pytest.importorskip("math_verify", reason="the math extra comes with requirements/test.txt")

from nemo_apo import record
from nemo_apo.config import Config, EvaluationConfig, RunConfig
from nemo_apo.config_rules import validate
from nemo_apo.core.filtering import GroupRules
from nemo_apo.grading import Grading, GradingSettings, Shaping
from nemo_apo.parallel import layout as parallel_layout
from nemo_apo.tasks import Prompt
from nemo_apo.tasks.data_sets import DatasetTask, MathTask
from nemo_apo.trainer import loop
from nemo_apo.trainer.checkpoint import CheckpointError
from nemo_apo.trainer.rollouts import Completions
from nemo_apo.trainer.run_folder import TrainingStopped
from nemo_apo.trainer.same_data import check_same_data
from nemo_apo.trainer.sampling import grade
from tests.grading.workers import MARK, left_running
from tests.parallel.ranks import run_ranks
from tests.tasks.tiny_chat import math_rows, save_tokenizer, write_jsonl

from .tiny_runs import begin, tiny_config

SHAPING = Shaping(format=0.5, repetition=0.25, repetition_ngram=1, overlong=1.0, overlong_cache=4)
WORKERS = GradingSettings(workers=1, wall_s=20.0)


@pytest.fixture
def task(tmp_path: Path) -> MathTask:
    """12 problems to train on, 4 of which make a step; 3 are held out."""
    return MathTask(
        tokenizer=str(save_tokenizer(tmp_path / "checkpoint")),
        path=write_jsonl(tmp_path / "train.jsonl", math_rows(12)),
        test_path=write_jsonl(tmp_path / "test.jsonl", math_rows(3, start=50)),
        system_prompt=None,
        max_prompt_length=96,
        max_response_length=8,
    )


def config_of(task: DatasetTask | MathTask, root: Path, **changes: object) -> Config:
    run = RunConfig(
        name="run",
        root=str(root),
        steps=2,
        save_every=1,
        console="off",
        tensorboard=False,
        report=False,
    )
    config = tiny_config(
        task=task,
        run=run,
        grading=WORKERS,
        shaping=SHAPING,
        evaluation=EvaluationConfig(every=100, prompts=3, pass_prompts=2, pass_k=2),
    )
    config = replace(config, **changes)
    validate(config, 1)
    return config


def lines_of(root: Path) -> list[dict]:
    text = (root / "run" / record.METRICS_FILE).read_text()
    return [json.loads(line) for line in text.splitlines()]


@pytest.mark.slow(reason="starts math-verify in workers several times")
def test_a_run_and_its_resumption(
    task: MathTask, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(MARK, str(tmp_path))
    config = config_of(task, tmp_path)
    assert config.grading.grader == "math_verify"
    first = replace(config, run=replace(config.run, stop_after=1))
    run_ranks(1, loop.run, first, timeout_s=300.0)
    # Other data behind the same settings is refused, and both digests are named.
    changed = replace(task, path=write_jsonl(tmp_path / "other.jsonl", math_rows(11)))
    resumed = replace(config, run=replace(config.run, if_exists="resume"))

    def refused() -> str:
        with pytest.raises(CheckpointError) as error:
            loop.run(replace(resumed, task=changed))
        return str(error.value)

    (message,) = run_ranks(1, refused, timeout_s=300.0)
    for digest in (task.fingerprint(), changed.fingerprint()):
        assert digest in message
    assert "task.prompts_sha256 was" in message
    run_ranks(1, loop.run, resumed, timeout_s=300.0)
    start, one, two = lines_of(tmp_path)
    assert start[record.EVAL_ACCURACY] == 0.0
    for line in (one, two):
        assert 0.0 <= line[record.REWARD_CORRECT] <= 1.0
        for name in record.SHAPING_TERMS.values():
            assert 0.0 <= line[name] <= 1.0
        assert line[record.REWARD_FAILED] == 0
    assert two[record.STEP] == 2
    assert left_running(str(tmp_path)) == []


def test_steps_walk_through_the_data_and_see_its_prompts(task: MathTask, tmp_path: Path) -> None:
    """Nothing is graded as mathematics here: that is seen above and below."""
    grading = GradingSettings(grader="exact_match")
    config = config_of(task, tmp_path, grading=grading, groups=GroupRules())

    def work() -> list[list[str]]:
        training = begin(config)
        training.run(4)
        seen = []
        for drawn in training.worker.drawn:
            texts = [
                task.text(tokens[: int(mask.nonzero()[0]) + 1].tolist())
                for tokens, mask in zip(drawn.tokens_NT, drawn.mask_NT, strict=True)
            ]
            assert all(text.endswith("<|im_start|>assistant\n") for text in texts)
            seen.append(sorted({text.split("user\n")[1].split("<|im_end|>")[0] for text in texts}))
        return seen

    steps = run_ranks(1, work)[0]
    assert [len(step) for step in steps] == [4, 4, 4, 4]
    assert sorted(steps[0] + steps[1] + steps[2]) == sorted(row["problem"] for row in math_rows(12))


def completions_of(task: MathTask, said: list[str], ends: list[bool]) -> Completions:
    """Completions with these texts, with or without the end token; log-probs are nobody's."""
    rows = [task._chat._tokenizer(text, add_special_tokens=False)["input_ids"] for text in said]
    rows = [row + ([task.end_id] if end else []) for row, end in zip(rows, ends, strict=True)]
    width = max(map(len, rows))
    padded = [row + [task.pad_id] * (width - len(row)) for row in rows]
    return Completions(
        tokens_NR=torch.tensor(padded),
        lengths_N=torch.tensor([len(row) for row in rows]),
        finished_N=torch.tensor(ends),
        logprobs_NR=torch.zeros(len(rows), width),
        logprob_sums_N=torch.zeros(len(rows), dtype=torch.float64),
    )


@pytest.mark.slow(reason="starts math-verify in workers")
def test_grades_and_terms_by_hand(task: MathTask, tmp_path: Path) -> None:
    task = replace(task, max_response_length=100)
    half = Prompt("?", (1,), r"\frac{1}{2}")
    said = [
        "<think>a b</think><answer>0.5</answer>",
        r"a a \boxed{\frac{2}{4}}",
        "<think>a</think><answer>2</answer>",
        r"\boxed{9^{9^{9^{9}}}}",
        "no" * 49,
    ]
    completions = completions_of(task, said, [True, True, True, True, False])
    lengths = completions.lengths_N.tolist()

    def work() -> tuple:
        layout = parallel_layout.initialize(config_of(task, tmp_path).parallel, 0)
        grading = Grading(replace(WORKERS, grader="math_verify"), task)
        shaping = replace(SHAPING, overlong_cache=20)
        with_terms = grade(layout, grading, task, [half] * 5, completions, shaping)
        without = grade(layout, grading, task, [half] * 5, completions)
        grading.close()
        assert torch.equal(without.rewards_N.nan_to_num(7), without.correct_N.nan_to_num(7))
        assert without.terms == {}
        assert with_terms.reasons == without.reasons == ("", "", "", "refused", "")
        terms = {name: term_N.tolist() for name, term_N in with_terms.terms.items()}
        return (
            with_terms.correct_N.tolist(),
            with_terms.rewards_N.tolist(),
            terms,
            with_terms.means(),
        )

    correct, rewards, terms, means = run_ranks(1, work, timeout_s=300.0)[0]
    assert correct[:3] + correct[4:] == [1.0, 1.0, 0.0, 0.0]
    assert terms["format"] == [1.0, 0.0, 1.0, 0.0, 0.0]
    assert terms["repetition"] == pytest.approx([0.0, 1 / 3, 0.0, 0.0, 0.0])
    used = [max(0.0, (length - 80) / 20) for length in lengths]
    assert terms["overlong"] == pytest.approx(used)
    assert used[-1] > 0.5
    wanted = [1.5, 1.0 - 0.25 / 3, 0.5, -used[4]]
    assert rewards[:3] + rewards[4:] == pytest.approx(wanted)
    assert rewards[3] != rewards[3]
    assert means[record.REWARD_CORRECT] == pytest.approx(0.5)
    assert means["reward/format"] == pytest.approx(0.4)


@dataclass(frozen=True)
class DifferentEverywhere(MathTask):
    """As if a file differed on the machines of a run."""

    def fingerprint(self) -> str:
        return f"digest of {torch.distributed.get_rank()}"


@dataclass(frozen=True)
class MissingOnOne(MathTask):
    """As if a file were missing on one machine."""

    def fingerprint(self) -> str:
        if torch.distributed.get_rank() == 1:
            raise ValueError("task.path=x: there is no such file or folder")
        return "digest"


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (DifferentEverywhere, "rank 1 has read other data than rank 0"),
        (MissingOnOne, "rank 1: task.path=x: there is no such file or folder"),
    ],
)
def test_ranks_that_read_different_data_stop_together(kind: type[MathTask], message: str) -> None:
    def work() -> str:
        with pytest.raises(TrainingStopped) as error:
            check_same_data(kind())
        return str(error.value)

    first, second = run_ranks(2, work)
    assert first == second
    assert first.startswith(message)
