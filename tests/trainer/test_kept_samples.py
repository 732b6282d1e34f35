"""Completions that a run keeps: the right steps and groups, as they were drawn, and only once."""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from nemo_apo import record
from nemo_apo.config import Config, ConfigError, RunConfig, UpdateConfig
from nemo_apo.core.alpha_schedule import ScheduleState
from nemo_apo.core.filtering import GroupRules
from nemo_apo.record import KeptGroup
from nemo_apo.tasks import Prompt
from nemo_apo.trainer.kept_samples import keeps_samples
from nemo_apo.trainer.loop import run
from nemo_apo.trainer.metrics import MetricsLog
from nemo_apo.trainer.rl_step import StoppedInRollout
from nemo_apo.trainer.run_folder import check_folder
from tests.parallel.ranks import run_ranks

from .test_stop_in_rollout import StopsAt, through_a_file
from .tiny_runs import TokenSumTask, begin, tiny_config

UPDATE = UpdateConfig(mini_batches=2, epochs=1, micro_batch_size=4)


@dataclass(frozen=True)
class SpokenTask(TokenSumTask):
    """Its texts hold what is awkward in a file; some grades fail."""

    def text(self, completion: list[int]) -> str:
        return f"\n\u2028</pre>\ud800{super().text(completion)}"

    def reference(self, prompt: Prompt) -> str:
        return f"the answer to {prompt.text}"

    def grade(self, prompt: Prompt, completion: list[int]) -> float:
        return float("nan") if self.fails(completion) else super().grade(prompt, completion)

    def fails(self, completion: list[int]) -> bool:
        return sum(completion) % 5 == 0


def in_folder(folder: Path, **run_values: Any) -> Config:
    values = {"root": str(folder), "samples_every": 2, **run_values}
    config = tiny_config(update=UPDATE, task=SpokenTask())
    return replace(config, run=replace(config.run, **values))


def kept_lines(folder: Path) -> list[dict[str, Any]]:
    path = folder / "tiny" / record.SAMPLES_FILE
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize(
    ("every", "steps", "expected"),
    [
        (3, 8, [1, 3, 6, 8]),
        (1, 3, [1, 2, 3]),
        (100, 5, [1, 5]),
        (0, 5, []),
    ],
)
def test_which_steps_keep_samples(every: int, steps: int, expected: list[int]) -> None:
    settings = RunConfig(samples_every=every, steps=steps)
    assert [step for step in range(1, steps + 1) if keeps_samples(settings, step)] == expected


def test_what_is_kept_is_what_was_drawn(tmp_path: Path) -> None:
    """Before failed grades are settled and groups dropped; the reward of none that failed."""

    def work() -> None:
        config = in_folder(tmp_path)
        config = replace(config, groups=GroupRules(failed_grade="drop"))
        training = begin(config)
        outcome = training.one()
        (drawn,) = training.worker.drawn
        task, size = config.task, config.rollout.group_size
        assert [group.step for group in outcome.kept] == [1, 1]
        failed = 0
        for index, group in enumerate(outcome.kept):
            assert len(group.completions) == size
            assert len(group.prompt) == task.length
            assert group.reference == f"the answer to {group.prompt}"
            for place, completion in enumerate(group.completions):
                row = index * size + place
                tokens = drawn.tokens_NT[row, 1:][drawn.mask_NT[row]].tolist()
                prompt = drawn.tokens_NT[row, : task.length].tolist()
                assert group.prompt == "".join("123456789"[token - 3] for token in prompt)
                assert completion.text == task.text(tokens)
                assert completion.length == len(tokens)
                assert completion.truncated == (tokens[-1] != task.end_id)
                if task.fails(tokens):
                    failed += 1
                    assert (completion.reward, completion.failed) == (None, "not_finite")
                else:
                    assert completion.reward == pytest.approx(sum(tokens) % 7 / 7.0)
                    assert completion.failed == ""
        assert 0 < failed < 2 * size, "the example fails no grade, or all"
        # The second step keeps none, and neither does one that asks for no group.
        assert training.run(2)[1].kept != ()
        assert training.worker.run(2, ScheduleState(), 0, 0).kept == ()

    run_ranks(1, work)


def test_a_run_writes_them_and_resuming_keeps_each_once(tmp_path: Path) -> None:
    def first() -> None:
        run(in_folder(tmp_path, steps=6, save_every=3, stop_after=5))

    def again() -> None:
        run(in_folder(tmp_path, steps=6, save_every=3, if_exists="resume"))

    def whole() -> None:
        run(in_folder(tmp_path / "whole", steps=6, save_every=0))

    for work in (first, again, whole):
        run_ranks(1, work)
    lines = kept_lines(tmp_path)
    assert [line["step"] for line in lines] == [1, 1, 2, 2, 4, 4, 6, 6]
    assert lines == kept_lines(tmp_path / "whole")
    assert all("\ud800" in one["text"] for line in lines for one in line["completions"])
    assert (tmp_path / "tiny" / record.SAMPLES_FILE).read_bytes().isascii()


def test_lines_beyond_the_checkpoint_are_cut_and_overwriting_removes_all(tmp_path: Path) -> None:
    config = in_folder(tmp_path)
    folder = tmp_path / "tiny"
    folder.mkdir()
    log = MetricsLog(folder, config, -1)
    for step in range(1, 5):
        log.write(step, {}, [], (KeptGroup(step, "a", "b", ()), KeptGroup(step, "c", "d", ())))
    log.close()
    with (folder / record.SAMPLES_FILE).open("a") as file:
        file.write('{"step": 2, "half')
    MetricsLog(folder, config, 2).close()
    assert [line["step"] for line in kept_lines(tmp_path)] == [1, 1, 2, 2]

    run_ranks(1, lambda: run(in_folder(tmp_path, steps=1, if_exists="overwrite")))
    assert [line["prompt"] for line in kept_lines(tmp_path)] != ["a", "c", "a", "c"]
    assert [line["step"] for line in kept_lines(tmp_path)] == [1, 1]


def test_a_rollout_in_a_checkpoint_brings_its_samples_along(tmp_path: Path) -> None:
    def work() -> None:
        config = in_folder(tmp_path)
        whole = begin(config)
        wanted = whole.one().kept
        training = begin(config, whole.layout)
        training.worker.stop = training.worker.source.stop = StopsAt(3)
        with pytest.raises(StoppedInRollout) as stop:
            training.run()
        stored = through_a_file(stop.value.rollout)
        got = training.worker.run(0, ScheduleState(), 0, 0, stored).kept
        assert got == wanted
        assert len(got) == 2

    run_ranks(1, work)


def drawn_on_a_rank(folder: Path) -> tuple[KeptGroup, ...]:
    torch.manual_seed(0)
    return begin(in_folder(folder)).one().kept


def test_all_ranks_hold_the_same(tmp_path: Path) -> None:
    (single,) = run_ranks(1, drawn_on_a_rank, tmp_path)
    assert run_ranks(2, drawn_on_a_rank, tmp_path) == [single, single]


def test_a_folder_that_holds_samples_holds_a_run(tmp_path: Path) -> None:
    check_folder(tmp_path, "error")
    (tmp_path / record.SAMPLES_FILE).write_text("")
    with pytest.raises(ConfigError, match="already holds a run"):
        check_folder(tmp_path, "error")
