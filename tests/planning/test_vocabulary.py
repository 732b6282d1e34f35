"""Which vocabulary a plan counts."""

import pytest

from nemo_apo.config import ConfigError
from nemo_apo.planning.plan import make_plan
from nemo_apo.planning.settings import read_question


@pytest.mark.parametrize(
    ("overrides", "size"),
    [
        (["model=qwen2.5_7b"], 152064),
        (["model=qwen3_0.6b", "vocab_size=1000"], 1000),
        (["model=tiny_qwen3", "model.vocab_size=100"], 100),
    ],
)
def test_the_models_own_unless_another_is_given(overrides: list[str], size: int) -> None:
    assert read_question(overrides).vocab_size == size


def test_a_model_without_one_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"workload\.vocab_size=null: must be set"):
        make_plan(read_question(["model=tiny_qwen3"]))
