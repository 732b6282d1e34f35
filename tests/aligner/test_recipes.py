"""Every recipe on every number of nodes keeps the batch constraints of the host."""

from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

import nemo_apo

hydra = pytest.importorskip("hydra")
omegaconf = pytest.importorskip("omegaconf")

CONF = Path(nemo_apo.__file__).parent.parent / "conf" / "aligner"
GPUS_PER_NODE = 8
RECIPES = ("qwen3_1.7b", "qwen3_8b", "qwen2.5_7b", "llama3.1_8b")
NODES = {"n1": 1, "n2": 2, "n4": 4, "n8": 8}
# (attention heads, key-value heads, layers, rows of the vocabulary) of the published models.
SHAPES = {
    "qwen3_1.7b": (16, 8, 28, 151936),
    "qwen3_8b": (32, 8, 36, 151936),
    "qwen2.5_7b": (28, 4, 28, 152064),
    "llama3.1_8b": (32, 8, 32, 128256),
}
# Every pair, and the file without either.
CHOICES = [(None, None), *((recipe, nodes) for recipe in RECIPES for nodes in NODES)]


@pytest.fixture(autouse=True, scope="module")
def _resolvers() -> Iterator[None]:
    """Those of the host's launch script."""
    resolvers = {
        "multiply": lambda x, y: x * y,
        "int_div": lambda x, y: x // y,
        "subtract": lambda x, y: x - y,
    }
    for name, function in resolvers.items():
        omegaconf.OmegaConf.register_new_resolver(name, function, replace=True)
    yield
    for name in resolvers:
        omegaconf.OmegaConf.clear_resolver(name)


@cache
def composed(recipe: str | None, nodes: str | None):
    """The configuration of a choice, as the command line would compose it; only read by tests."""
    chosen = {"recipe": recipe, "nodes": nodes}
    overrides = [f"+{group}={option}" for group, option in chosen.items() if option is not None]
    with hydra.initialize_config_dir(str(CONF), version_base=None):
        config = hydra.compose("gpt_apo", overrides)
    omegaconf.OmegaConf.resolve(config)
    return config


@pytest.fixture(params=CHOICES, ids=lambda choice: "-".join(map(str, choice)))
def choice(request: pytest.FixtureRequest) -> tuple[str | None, str | None]:
    return request.param


@pytest.fixture
def config(choice: tuple[str | None, str | None]):
    return composed(*choice)


def data_parallel_size(config) -> int:
    model = config.model
    model_ranks = (
        model.tensor_model_parallel_size
        * model.pipeline_model_parallel_size
        * model.context_parallel_size
    )
    world = config.trainer.num_nodes * config.trainer.devices
    assert world % model_ranks == 0
    return world // model_ranks


def test_the_files_are_those_tested() -> None:
    assert {path.stem for path in (CONF / "recipe").glob("*.yaml")} == set(RECIPES)
    assert {path.stem for path in (CONF / "nodes").glob("*.yaml")} == set(NODES)


def test_the_first_comment_says_what_a_file_is() -> None:
    for path in CONF.rglob("*.yaml"):
        lines = [line for line in path.read_text().splitlines() if "@package" not in line]
        assert lines[0].startswith("# ")
        assert len(lines[0]) > 15


def test_the_world(choice: tuple[str | None, str | None], config) -> None:
    assert config.trainer.devices == GPUS_PER_NODE
    assert config.trainer.num_nodes == NODES.get(choice[1], 1)
    assert data_parallel_size(config) >= 1


def test_optimizer_steps_hold_whole_groups_and_fill_the_rollout(config) -> None:
    grpo, model = config.trainer.grpo, config.model
    rollout = grpo.num_prompts_per_grpo_step * grpo.samples_per_prompt
    ranks = data_parallel_size(config)
    assert model.global_batch_size % grpo.samples_per_prompt == 0
    assert model.global_batch_size % (ranks * model.micro_batch_size) == 0
    assert rollout % model.global_batch_size == 0
    assert rollout // model.global_batch_size >= 2, "on anchor old, alpha needs a second step"
    assert rollout % ranks == 0
    # The launch script cuts the prompts themselves over the ranks.
    assert grpo.num_prompts_per_grpo_step % ranks == 0
    assert (grpo.model_gbs, grpo.model_mbs) == (model.global_batch_size, model.micro_batch_size)


def test_log_prob_passes_divide_what_a_rank_holds(config) -> None:
    grpo, model, ranks = config.trainer.grpo, config.model, data_parallel_size(config)
    held = {
        "rollout": grpo.num_prompts_per_grpo_step * grpo.samples_per_prompt,
        "validation": grpo.val_num_prompts_per_grpo_step * grpo.val_samples_per_prompt,
        "optimizer step": model.global_batch_size,
    }
    for name, sequences in held.items():
        assert sequences % ranks == 0, name
        assert (sequences // ranks) % model.grpo.forward_micro_batch_size == 0, name


def test_generation(config) -> None:
    grpo = config.trainer.grpo
    for prompts, samples in (
        (grpo.prompt_micro_batch_size, grpo.samples_per_prompt),
        (grpo.val_prompt_micro_batch_size, grpo.val_samples_per_prompt),
    ):
        assert grpo.generation_rollout_mbs % prompts == 0
        assert samples % (grpo.generation_rollout_mbs // prompts) == 0
    ranks = data_parallel_size(config)
    if grpo.inference_backend.reshard:
        model = config.model
        ranks *= model.pipeline_model_parallel_size * model.context_parallel_size
    assert grpo.num_prompts_per_grpo_step * grpo.samples_per_prompt % ranks == 0
    assert grpo.val_num_prompts_per_grpo_step * grpo.val_samples_per_prompt % ranks == 0
    enabled = [name for name, backend in grpo.inference_backend.config.items() if backend.enable]
    assert enabled == [grpo.inference_backend.type]
    assert config.model.grpo.inference_backend == grpo.inference_backend
    # A context rank would sample answers of its own for the prompts that it shares.
    assert config.model.context_parallel_size == 1 or grpo.inference_backend.reshard
    assert grpo.inference_backend.max_input_len > 0


def test_batches_of_training_do_not_depend_on_the_number_of_nodes() -> None:
    trained = set()
    for nodes in NODES:
        config = composed("llama3.1_8b", nodes)
        grpo = config.trainer.grpo
        trained.add(
            (
                grpo.num_prompts_per_grpo_step,
                grpo.samples_per_prompt,
                config.model.global_batch_size,
            )
        )
    assert len(trained) == 1


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_model_can_be_cut_as_its_recipe_says(recipe: str) -> None:
    heads, key_value_heads, layers, rows = SHAPES[recipe]
    model = composed(recipe, "n1").model
    tensor = model.tensor_model_parallel_size
    assert heads % tensor == 0
    assert key_value_heads % tensor == 0
    assert layers % model.pipeline_model_parallel_size == 0
    assert model.override_vocab_size == rows
    assert rows % tensor == 0
    # Gradients of replicated query and key norms are not summed over tensor ranks without it.
    if model.get("qk_layernorm", False):
        assert tensor == 1 or model.sequence_parallel


def test_keys_of_the_host_that_our_loss_replaces_are_null(config) -> None:
    grpo, model = config.trainer.grpo, config.model.grpo
    for section, key in (
        (grpo, "initial_policy_kl_penalty"),
        (grpo, "use_leave_one_out_baseline"),
        (grpo, "normalize_rewards"),
        (grpo, "importance_sample_correct"),
        (model, "initial_policy_kl_penalty"),
        (model, "ratio_eps"),
        (model, "ratio_eps_low"),
        (model, "ratio_eps_high"),
        (model.dapo, "token_loss"),
        (model.dapo, "clip_higher"),
    ):
        assert key in section
        assert section[key] is None
    assert grpo.length_penalty_enabled is False
    assert grpo.dapo.length_penalty is False
    assert config.model.overwrite_base_config.apo is True
