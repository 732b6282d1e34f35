"""Which groups are trained on."""

import pytest
import torch

from nemo_apo.core.filtering import GroupRules, SettledGroups, settle_groups
from nemo_apo.core.groups import Groups

NAN, INF = float("nan"), float("inf")


def settle(
    ids: list[int],
    rewards: list[float] | None = None,
    lengths: list[int] | None = None,
    truncated: list[bool] | None = None,
    rules: GroupRules | None = None,
) -> SettledGroups:
    count = len(ids)
    return settle_groups(
        torch.tensor([0.5] * count if rewards is None else rewards),
        torch.tensor([4] * count if lengths is None else lengths),
        torch.tensor([False] * count if truncated is None else truncated),
        Groups.from_ids(torch.tensor(ids)),
        GroupRules() if rules is None else rules,
    )


def test_healthy_groups_are_kept() -> None:
    settled = settle([1, 0, 1, 0], rewards=[0.25, 0.5, 1.0, 0.0])
    assert settled.keep_N.tolist() == [True] * 4
    assert settled.rewards_N.dtype == torch.float64
    assert settled.rewards_N.tolist() == [0.25, 0.5, 1.0, 0.0]
    assert settled.failed_grades == 0
    assert sum(settled.dropped.values()) == 0


def test_a_single_completion_is_dropped() -> None:
    settled = settle([0, 7, 0])
    assert settled.keep_N.tolist() == [True, False, True]
    assert settled.dropped == {"single completion": 1, "empty completion": 0}


def test_an_empty_completion_drops_its_whole_group() -> None:
    settled = settle([0, 1, 0, 1, 2, 2], lengths=[3, 3, 0, 3, 1, 1])
    assert settled.keep_N.tolist() == [False, True, False, True, True, True]
    assert settled.dropped == {"single completion": 0, "empty completion": 1}


def test_a_fully_masked_group_is_dropped_once() -> None:
    settled = settle([0, 0, 0, 1, 1], lengths=[0, 0, 0, 1, 1])
    assert settled.keep_N.tolist() == [False] * 3 + [True] * 2
    assert settled.dropped["empty completion"] == 1


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
def test_a_failed_grade_takes_the_configured_value(bad: float) -> None:
    rules = GroupRules(failed_grade="value", failed_reward=-0.25)
    settled = settle([0, 0, 1, 1], rewards=[1.0, bad, 0.5, 0.0], rules=rules)
    assert settled.keep_N.all()
    assert settled.rewards_N.tolist() == [1.0, -0.25, 0.5, 0.0]
    assert settled.failed_grades == 1


def test_a_failed_grade_drops_its_whole_group() -> None:
    rules = GroupRules(failed_grade="drop")
    settled = settle([0, 0, 1, 1, 1], rewards=[1.0, 0.0, NAN, 0.5, INF], rules=rules)
    assert settled.keep_N.tolist() == [True, True, False, False, False]
    assert settled.failed_grades == 2
    assert settled.dropped["failed grade"] == 1


def test_truncated_completions_by_both_rules() -> None:
    flags = [False, True, False, False]
    kept = settle([0, 0, 1, 1], truncated=flags)
    assert kept.keep_N.all()
    assert "truncated completion" not in kept.dropped
    dropped = settle([0, 0, 1, 1], truncated=flags, rules=GroupRules(truncated="drop"))
    assert dropped.keep_N.tolist() == [False, False, True, True]
    assert dropped.dropped["truncated completion"] == 1


def test_each_group_counts_under_its_first_reason() -> None:
    rules = GroupRules(failed_grade="drop", truncated="drop")
    settled = settle(
        [0, 1, 1, 2, 2, 3, 3, 4, 4],
        rewards=[NAN, NAN, 0.0, NAN, 1.0, 1.0, 0.0, 1.0, 0.0],
        lengths=[0, 0, 2, 2, 2, 2, 2, 2, 2],
        truncated=[True, False, True, True, False, True, True, False, False],
        rules=rules,
    )
    assert settled.dropped == {
        "single completion": 1,
        "empty completion": 1,
        "failed grade": 1,
        "truncated completion": 1,
    }
    assert settled.keep_N.tolist() == [False] * 7 + [True] * 2
    assert settled.failed_grades == 3


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("failed_grade", "zero"),
        ("truncated", "cut"),
        ("failed_reward", NAN),
        ("failed_reward", INF),
    ],
)
def test_bad_rules_name_key_and_value(key: str, value: object) -> None:
    with pytest.raises(ValueError, match=rf"groups\.{key} must .*{value}"):
        GroupRules(**{key: value})
