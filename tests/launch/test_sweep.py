import pytest

from nemo_apo.config import ConfigError
from nemo_apo.launch.sweep import read_sweep


def test_every_combination_the_last_axis_fastest() -> None:
    fixed, elements = read_sweep(["objective=apo,gspo", "run.steps=3", "run.seed=0,1,2"])
    assert fixed == ["run.steps=3"]
    assert [element.overrides for element in elements] == [
        ("objective=apo", "run.seed=0"),
        ("objective=apo", "run.seed=1"),
        ("objective=apo", "run.seed=2"),
        ("objective=gspo", "run.seed=0"),
        ("objective=gspo", "run.seed=1"),
        ("objective=gspo", "run.seed=2"),
    ]
    assert elements[4].name == "objective-gspo_seed-1"


def test_a_range_and_numbers_with_points() -> None:
    _, elements = read_sweep(["run.seed=range(0,2)", "schedule.alpha_min=0.35,1e-3"])
    assert [element.name for element in elements] == [
        "seed-0_alpha_min-0.35",
        "seed-0_alpha_min-0.001",
        "seed-1_alpha_min-0.35",
        "seed-1_alpha_min-0.001",
    ]


def test_a_list_is_one_value() -> None:
    fixed, elements = read_sweep(["run.allow_changed=[task,tau]", "run.seed=0,1"])
    assert fixed == ["run.allow_changed=[task,tau]"]
    assert len(elements) == 2


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["run.seed=1"], "needs an override with several values"),
        (["run.seed=1,2", "run.seed=3,4"], "run.seed is swept already"),
        (["run.seed=1,1"], "two runs would have the same folder"),
        (["run.seed=range(0,1001)"], "1001 runs, must be at most 1000"),
    ],
)
def test_refused(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read_sweep(overrides)
