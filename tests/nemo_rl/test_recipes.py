"""The shipped recipes over a small example, and what composing a configuration refuses."""

from pathlib import Path
from typing import Any

import pytest

from nemo_apo.compose import compose as compose_experiment
from nemo_apo.compose.files import conf_dir
from nemo_apo.config import Config, ConfigError
from nemo_apo.core.objectives import OBJECTIVES
from nemo_apo.nemo_rl import recipes, run_grpo
from nemo_apo.nemo_rl.settings import BLOCK
from tests.nemo_rl import example_host
from tests.nemo_rl.example_config import example

CONF = conf_dir() / "nemo_rl"
# A recipe, and the experiment of the embedded trainer whose numbers it has.
RECIPES = {
    "qwen3_1p7b_math3_dtensor": "apo_qwen3_1p7b_math3",
    "qwen3_1p7b_math3_megatron": "apo_qwen3_1p7b_math3",
    "qwen3_8b_math_dtensor": "apo_qwen3_8b_math",
    "qwen3_8b_math_megatron": "apo_qwen3_8b_math",
}
DATA = ("data.train.data_path=/data/train.jsonl", "data.validation.data_path=/data/held_out.jsonl")


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return example_host.install(tmp_path / "NeMo-RL", monkeypatch)


def composed(host: Path, file: str, *overrides: str) -> dict[str, Any]:
    return recipes.compose(file, overrides, host)


def test_the_files_are_those_tested() -> None:
    assert {path.stem for path in CONF.glob("*.yaml")} == {*RECIPES, "apo"}


def test_the_first_comment_says_what_a_file_is() -> None:
    for path in CONF.rglob("*.yaml"):
        assert path.read_text(encoding="utf-8").startswith("# "), path


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_keeps_every_rule(recipe: str, host: Path) -> None:
    settings = run_grpo.check(composed(host, recipe, *DATA))
    assert settings.objective.name == "apo"


@pytest.mark.parametrize(("recipe", "experiment"), RECIPES.items())
def test_a_recipe_has_the_numbers_of_its_experiment(
    recipe: str, experiment: str, host: Path
) -> None:
    config, wanted = composed(host, recipe, *DATA), compose_experiment([f"experiment={experiment}"])
    settings = run_grpo.check(config)
    assert (settings.objective, settings.tau) == (wanted.objective, wanted.tau)
    assert settings.schedule == wanted.schedule
    assert settings.regularizers == wanted.regularizers
    assert _shape_of_the_host(config) == _shape(wanted)
    assert config["policy"]["model_name"].split("/")[1].lower() == wanted.model.name.replace(
        "_", "-"
    )
    assert _learning(config["policy"], recipe) == (
        wanted.optimizer.lr,
        wanted.optimizer.weight_decay,
        wanted.optimizer.adam_beta2,
    )


def _shape(config: Config) -> dict[str, Any]:
    """Of the embedded trainer."""
    rollout, task = config.rollout, config.task
    batch = rollout.prompts * rollout.group_size // config.update.mini_batches
    return {
        "steps": config.run.steps,
        "prompts": rollout.prompts,
        "group": rollout.group_size,
        "batch": batch,
        "answer": task.max_response_length,
        "prompt": task.max_prompt_length,
        "both": task.max_prompt_length + task.max_response_length,
        "clip": config.optimizer.clip_grad,
        "evaluated": (config.evaluation.every, config.evaluation.prompts),
    }


def _shape_of_the_host(config: dict[str, Any]) -> dict[str, Any]:
    """The same of a NeMo-RL configuration."""
    grpo, policy = config["grpo"], config["policy"]
    return {
        "steps": grpo["max_num_steps"],
        "prompts": grpo["num_prompts_per_step"],
        "group": grpo["num_generations_per_prompt"],
        "batch": policy["train_global_batch_size"],
        "answer": policy["generation"]["max_new_tokens"],
        "prompt": config["data"]["max_input_seq_length"],
        "both": policy["max_total_sequence_length"],
        "clip": policy["max_grad_norm"],
        "evaluated": (grpo["val_period"], grpo["max_val_samples"]),
    }


def _learning(policy: dict[str, Any], recipe: str) -> tuple[float, float, float]:
    """Learning rate, weight decay and beta2 of a recipe's backend."""
    if recipe.endswith("megatron"):
        adam = policy["megatron_cfg"]["optimizer"]
        assert adam["min_lr"] == adam["lr"], "constant"
        return adam["lr"], adam["weight_decay"], adam["adam_beta2"]
    adam = policy["optimizer"]["kwargs"]
    return adam["lr"], adam["weight_decay"], adam["betas"][1]


@pytest.mark.parametrize("recipe", RECIPES)
def test_optimizer_steps_divide_over_a_node(recipe: str, host: Path) -> None:
    config = composed(host, recipe, *DATA)
    stages = 2 if recipe == "qwen3_8b_math_megatron" else 1
    ranks = config["cluster"]["gpus_per_node"] // stages
    policy = config["policy"]
    assert policy["train_global_batch_size"] % (ranks * policy["train_micro_batch_size"]) == 0
    steps = config["grpo"]["num_prompts_per_step"] * config["grpo"]["num_generations_per_prompt"]
    assert steps // policy["train_global_batch_size"] == 2, "on anchor old, alpha needs a second"


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_asks_for_its_data(recipe: str, host: Path) -> None:
    with pytest.raises(ConfigError, match=r"^data\.validation\.data_path: .*[Mm]issing"):
        composed(host, recipe, DATA[0])


def test_a_file_of_ones_own(host: Path, tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text("grpo: {max_num_steps: 7, max_num_epochs: 3}\n")
    mine = tmp_path / "mine.yaml"
    mine.write_text(
        "defaults: [examples/configs/grpo_math_1B.yaml, base.yaml]\n"
        "grpo: {max_num_epochs: 4}\napo: {schedule: {alpha_min: 0.25}}\n"
    )
    config = composed(host, str(mine), "grpo.num_prompts_per_step=16")
    grpo = {**example()["grpo"], "max_num_steps": 7, "max_num_epochs": 4}
    assert config["grpo"]["max_num_steps"] == grpo["max_num_steps"]
    assert config["grpo"]["max_num_epochs"] == grpo["max_num_epochs"]
    assert config["grpo"]["num_prompts_per_step"] == 16
    assert config["grpo"]["adv_estimator"]["normalize_rewards"] is True, (
        "interpolations are resolved"
    )
    assert config["apo"]["schedule"] == {**BLOCK.shipped()["schedule"], "alpha_min": 0.25}
    assert "defaults" not in config


def test_what_lies_beside_a_file_comes_before_what_nemo_rl_has(host: Path, tmp_path: Path) -> None:
    (host / "base.yaml").write_text("grpo: {max_num_steps: 1}\n")
    (tmp_path / "base.yaml").write_text("grpo: {max_num_steps: 2}\n")
    (tmp_path / "mine.yaml").write_text("defaults: base.yaml\n")
    assert composed(host, str(tmp_path / "mine.yaml"))["grpo"] == {"max_num_steps": 2}


@pytest.mark.parametrize("plus", ["", "+", "++"])
@pytest.mark.parametrize("block", ["", "apo: {schedule: {alpha_min: 0.2, rho_r: 0.9}}\n"])
def test_a_key_of_apo_is_set_with_or_without_plus(
    plus: str, block: str, host: Path, tmp_path: Path
) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(f"defaults: examples/configs/grpo_math_1B.yaml\n{block}")
    schedule = composed(host, str(file), f"{plus}apo.schedule.alpha_min=0.4")["apo"]["schedule"]
    assert schedule["alpha_min"] == 0.4
    assert schedule["rho_r"] == (0.9 if block else 0.98)
    whole = composed(host, str(file), plus + "apo={tau: {base: 0.5}}")["apo"]
    assert whole["tau"]["base"] == 0.5
    assert whole["schedule"]["rho_r"] == schedule["rho_r"]


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["grpo.num_promts_per_step=8"], r"^grpo\.num_promts_per_step: there is no such key; did"),
        (["+grpo.max_num_steps=8"], "overrides: Could not append to config"),
        (["grpo.max_num_steps=[1"], r"^grpo\.max_num_steps=\[1: "),
        (["apox.tau=1"], r"^apox\.tau: there is no such key"),
    ],
)
def test_what_is_wrong_with_an_override(overrides: list[str], said: str, host: Path) -> None:
    with pytest.raises(ConfigError, match=said) as error:
        composed(host, str(host / "examples/configs/grpo_math_1B.yaml"), *overrides)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("defaults: nowhere.yaml\n", "defaults: nowhere.yaml is neither beside .* --nemo-rl DIR"),
        ("- a\n", "must hold keys and values"),
        ("grpo: [\n", "mine.yaml: "),
        ("grpo: {max_num_steps: '${nothing}'}\n", r"grpo\.max_num_steps: Interpolation key"),
    ],
)
def test_what_is_wrong_with_a_file(text: str, said: str, host: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(text)
    with pytest.raises(ConfigError, match=said) as error:
        composed(host, str(tmp_path / "mine.yaml"))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("objective", "override", "lacks"),
    [
        ("grpo", "apo.schedule.alpha_min=0.4", "alpha"),
        ("adpo_softmax", "+apo.schedule.name=ess", "alpha"),
        ("gspo", "++apo.tau.base=0.4", "anchor"),
        ("gspo", "apo.anchor={name: old}", "anchor"),
    ],
)
def test_an_override_that_nothing_would_read(objective: str, override: str, lacks: str) -> None:
    with pytest.raises(ConfigError, match=f"{objective} has no {lacks}") as error:
        recipes.check_read(["grpo.seed=1", override], OBJECTIVES[objective])
    assert str(error.value).startswith(override)


def test_overrides_that_are_read() -> None:
    read = ["apo.tau.base=0.4", "apo.objective.beta_r=0.1", "apo.resume.without_state=fresh"]
    recipes.check_read([*read, "grpo.schedule=1"], OBJECTIVES["adpo_softmax"])
    recipes.check_read(["apo.schedule.alpha_min=0.4"], OBJECTIVES["apo"])


def test_a_name_that_is_no_recipe(host: Path) -> None:
    with pytest.raises(ConfigError, match=r"mine: no such file.* those are qwen3_1p7b_math3_"):
        composed(host, "mine")
