"""The shipped recipes: what the author published stands in them, and their layouts fit."""

import dataclasses

import pytest

from nemo_apo.compose import compose, group_options
from nemo_apo.config_rules import validate
from nemo_apo.planning.run_memory import run_memory
from nemo_apo.planning.settings import GPU_MEMORY

# GPUs that a recipe's own comment names.
RECIPES = {
    "apo_qwen3_1p7b_math3": 8,
    "apo_qwen3_1p7b_math3_advised": 8,
    "apo_qwen3_4b_math": 8,
    "apo_qwen2p5_7b_math": 8,
    "apo_qwen3_8b_math": 8,
    "apo_qwen3_14b_math": 16,
    "apo_qwen3_32b_math": 32,
}


def test_every_recipe_is_tested() -> None:
    shipped = {name for name in group_options()["experiment"] if name.startswith("apo_")}
    assert set(RECIPES) == shipped


def test_the_published_settings() -> None:
    config = compose(["experiment=apo_qwen3_1p7b_math3"])
    assert (config.rollout.prompts, config.rollout.group_size) == (48, 6)
    assert (config.update.mini_batches, config.update.epochs) == (2, 1)
    assert (config.task.max_prompt_length, config.task.max_response_length) == (1024, 1280)
    assert config.optimizer.lr == 1e-6
    assert config.rollout.temperature == 1.0
    tau, objective, schedule = (
        dataclasses.asdict(section) for section in (config.tau, config.objective, config.schedule)
    )
    assert (tau["base"], objective["beta_r"]) == (0.5, 0.3)
    assert (schedule["alpha_max"], schedule["alpha_min"]) == (0.9, 0.35)
    assert dataclasses.asdict(config.task)["levels"] == (3,)
    assert config.model.num_layers == 28


def test_the_advised_variant_differs_in_two_settings() -> None:
    published = dataclasses.asdict(compose(["experiment=apo_qwen3_1p7b_math3"]))
    advised = dataclasses.asdict(compose(["experiment=apo_qwen3_1p7b_math3_advised"]))
    changed = {
        (section, key)
        for section, values in published.items()
        for key, value in values.items()
        if advised[section][key] != value
    }
    assert changed == {("run", "name"), ("tau", "base"), ("schedule", "confidence")}
    assert advised["tau"]["base"] / advised["objective"]["beta_r"] == pytest.approx(0.4)


@pytest.mark.parametrize(("name", "gpus"), RECIPES.items())
def test_a_recipe_fits_on_the_gpus_that_it_names(name: str, gpus: int) -> None:
    config = compose([f"experiment={name}"])
    validate(config, gpus, reads_files=False)
    # A tenth is left to CUDA, communication and fragments, as in nemo-apo plan.
    assert run_memory(config, gpus).total < 0.9 * GPU_MEMORY["h100"]
    assert config.task.tokenizer == config.model.path
