"""Training that is graded by workers, some of which fail, on two ranks."""

import json
import os
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from nemo_apo import record
from nemo_apo.config import Config
from nemo_apo.core.filtering import GroupRules
from nemo_apo.grading import GradingSettings
from nemo_apo.parallel.gather import all_gather_objects
from nemo_apo.trainer import loop
from tests.forked_ranks import RankFailure
from tests.grading.misbehaving import REASON_OF_DEED, MisbehavingTask, deed_of
from tests.grading.workers import MARK, left_running
from tests.parallel.ranks import run_ranks

from .tiny_runs import begin, tiny_config

WORKERS = GradingSettings(workers=2, wall_s=2.0, cpu_s=5, total_s=60.0)


def config_of(**sections: Any) -> Config:
    return tiny_config(
        task=MisbehavingTask(), grading=WORKERS, groups=GroupRules(failed_reward=-1.0), **sections
    )


def test_every_rank_has_the_same_rewards_and_the_same_counts() -> None:
    def work() -> None:
        training = begin(config_of())
        outcomes = training.run(2)
        reasons: Counter[str] = Counter()
        for drawn in training.worker.drawn:
            width = training.config.task.max_prompt_length - 1
            for row in range(drawn.count):
                length = int(drawn.lengths_N[row])
                begins = int(drawn.mask_NT[row].nonzero()[0]) + 1
                assert begins == width + 1
                completion = drawn.tokens_NT[row, begins : begins + length].tolist()
                deed = deed_of(completion)
                reasons.update([REASON_OF_DEED[deed]] if deed else [])
                wanted = float("nan") if deed else sum(completion) % 7 / 7.0
                assert drawn.rewards_N[row] == wanted or (deed and drawn.rewards_N[row].isnan())
        assert len(reasons) >= 3, "the example has too few kinds of failures"
        for reason, name in record.FAILED_GRADES_BY_REASON.items():
            counted = sum(outcome.metrics.get(name, 0) for outcome in outcomes)
            assert counted == reasons[reason]
        failed = [outcome.metrics[record.REWARD_FAILED] for outcome in outcomes]
        assert sum(failed) == reasons.total()
        assert [outcome.skipped for outcome in outcomes] == [0, 0]
        settled = torch.cat([read.rewards_N for read in training.worker.read])
        assert int((settled == -1.0).sum()) == reasons.total()
        names = [record.REWARD_MEAN, *record.FAILED_GRADES_BY_REASON.values()]
        mine = [[outcome.metrics.get(name) for name in names] for outcome in outcomes]
        first, second = all_gather_objects((mine, settled.tolist()))
        assert first == second
        training.worker.source.grading.close()

    run_ranks(2, work)


def test_a_run_goes_on_and_leaves_its_counts_and_no_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(MARK, str(tmp_path))
    config = config_of()
    config = replace(config, run=replace(config.run, root=str(tmp_path), name="run", steps=2))
    run_ranks(2, loop.run, config)
    lines = (tmp_path / "run" / record.METRICS_FILE).read_text().splitlines()
    for line in map(json.loads, lines[1:]):
        by_reason = [line.get(name, 0) for name in record.FAILED_GRADES_BY_REASON.values()]
        assert line[record.REWARD_FAILED] == sum(by_reason)
    assert json.loads(lines[-1])[record.STEP] == 2
    assert left_running(str(tmp_path)) == []


def test_a_rank_without_workers_ends_the_run_on_all_ranks() -> None:
    def work() -> None:
        rank = torch.distributed.get_rank()
        os.environ["GRADING_TEST_RANK"] = str(rank)
        training = begin(config_of())
        broken = MisbehavingTask()
        object.__setattr__(broken, "broken_where", "1")
        training.worker.source.grading._task = broken
        try:
            training.one()
        except Exception as error:
            mine = f"{type(error).__name__}: {error}"
        else:
            mine = "went on"
        assert (
            all_gather_objects(mine) == ["GradingBroken: rank 1: RuntimeError: no grader here"] * 2
        )

    run_ranks(2, work)


def test_the_first_failure_of_a_kind_is_told_once(caplog: pytest.LogCaptureFixture) -> None:
    def work() -> list[str]:
        training = begin(config_of())
        training.run(3)
        training.worker.source.grading.close()
        return [message for message in caplog.messages if "got no grade" in message]

    told, silent = run_ranks(2, work)
    assert silent == []
    assert len(told) == len({message.split(":")[1] for message in told}) >= 3
    assert any("the grader raised (ValueError at misbehaving.py:" in message for message in told)
    assert not any("canary" in message for message in told)


def test_the_loop_ends_with_the_reason(tmp_path: Path) -> None:
    config = config_of()
    config = replace(
        config,
        run=replace(config.run, root=str(tmp_path), name="run"),
        grading=replace(WORKERS, grader="no_such_package:grade"),
    )
    with pytest.raises(RankFailure, match=r"GradingBroken: rank 0.*no_such_package"):
        run_ranks(1, loop.run, config)
