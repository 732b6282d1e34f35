"""Recipes and rules against the examples of a real NeMo-RL, which NEMO_RL_SRC names.

Needs its files and the module that merges them, nothing of what it trains with.
"""

import ast
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from omegaconf import OmegaConf

from nemo_apo.config import ConfigError
from nemo_apo.nemo_rl import host_rules, recipes, run_grpo
from tests.nemo_rl.example_config import NEEDED, example
from tests.nemo_rl.test_recipes import DATA, RECIPES

VARIABLE = "NEMO_RL_SRC"
SOURCE = os.environ.get(VARIABLE)
FITTING = [f"{key}={str(value).lower()}" for key, value in NEEDED.items()]
STARTED_FROM = ("grpo_math_1B", "grpo_math_1B_megatron", "grpo_math_8B", "grpo_math_8B_megatron")

pytestmark = pytest.mark.skipif(not SOURCE, reason=f"{VARIABLE} names no checkout of NeMo-RL")


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The checkout's folder; its ``nemo_rl`` is importable meanwhile."""
    assert SOURCE
    before = {name for name in sys.modules if name.split(".")[0] == "nemo_rl"}
    monkeypatch.syspath_prepend(SOURCE)
    yield Path(SOURCE)
    for name in [name for name in sys.modules if name.split(".")[0] == "nemo_rl"]:
        if name not in before:
            del sys.modules[name]


@pytest.fixture
def functions(host: Path) -> ModuleType:
    import nemo_rl.utils.config

    assert Path(nemo_rl.utils.config.__file__).is_relative_to(host)
    return nemo_rl.utils.config


def examples(host: Path) -> Path:
    return host / "examples" / "configs"


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_keeps_every_rule(recipe: str, host: Path) -> None:
    config = recipes.compose(recipe, DATA, host)
    run_grpo.check(config)
    assert config["policy"]["megatron_cfg"]["enabled"] is recipe.endswith("megatron")
    assert config["policy"]["dtensor_cfg"]["enabled"] is recipe.endswith("dtensor")


@pytest.mark.parametrize("name", STARTED_FROM)
def test_an_example_passes_with_what_apo_needs(name: str, host: Path) -> None:
    file = str(examples(host) / f"{name}.yaml")
    run_grpo.check(recipes.compose(file, FITTING, host))
    for left_out in FITTING:
        others = [override for override in FITTING if override != left_out]
        with pytest.raises(ConfigError):
            run_grpo.check(recipes.compose(file, others, host))


@pytest.mark.parametrize("name", STARTED_FROM)
def test_files_are_merged_as_nemo_rl_merges_them(
    name: str, host: Path, functions: ModuleType
) -> None:
    file = examples(host) / f"{name}.yaml"
    overrides = ["grpo.max_num_steps=3", "~checkpointing.save_period", "+policy.extra=1"]
    wanted = functions.parse_hydra_overrides(functions.load_config(file), overrides)
    composed = recipes.compose(str(file), overrides, host)
    assert composed.pop("apo")
    assert composed == OmegaConf.to_container(wanted, resolve=True)


def test_the_small_example_of_the_tests_says_what_the_real_one_says(host: Path) -> None:
    real = recipes.compose(str(examples(host) / "grpo_math_1B.yaml"), [], host)
    small = OmegaConf.to_container(OmegaConf.create(example()), resolve=True)
    assert list(_differences(small, real)) == []


def _differences(small: Any, real: Any, key: str = "") -> Iterator[str]:
    """Keys of the first that the second lacks, or whose value differs."""
    if not isinstance(small, dict):
        if small != real:
            yield f"{key}: {small!r}, not {real!r}"
        return
    for name, value in small.items():
        if name not in real:
            yield f"{key}{name} is missing"
        else:
            yield from _differences(value, real[name], f"{key}{name}.")


def test_the_defaults_of_the_hosts_loss_are_those_of_its_class(host: Path) -> None:
    """Read off the source: importing it takes all that NeMo-RL trains with."""
    tree = ast.parse((host / "nemo_rl/algorithms/loss/loss_functions.py").read_text())
    [found] = [
        node
        for node in tree.body
        if isinstance(node, ast.ClassDef) and node.name == "ClippedPGLossConfig"
    ]
    defaults = {
        line.target.id: ast.literal_eval(line.value)
        for line in found.body
        if isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name) and line.value
    }
    ours = {name: default for name, (default, _) in host_rules.REPLACED.items()}
    assert defaults == {
        **ours,
        "reference_policy_kl_penalty": 0.01,
        "force_on_policy_ratio": False,
    }
