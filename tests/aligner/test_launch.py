"""The launch: what is refused before anything starts, and a run on the real branch."""

import contextlib
import copy
import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import fields
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

hydra = pytest.importorskip("hydra")

from omegaconf import DictConfig, OmegaConf  # noqa: E402

import nemo_apo  # noqa: E402
from nemo_apo.aligner import host_rules, train_gpt_apo  # noqa: E402
from nemo_apo.aligner.settings import BLOCK, read_settings  # noqa: E402
from nemo_apo.compose.files import conf_dir  # noqa: E402
from nemo_apo.config import TAGGED_SECTIONS, ConfigError  # noqa: E402
from nemo_apo.plugin.settings import ApoSettings  # noqa: E402

ROOT = Path(nemo_apo.__file__).parent.parent
TAGGED = ("objective", "schedule", "tau")
NAMED = [(section, name) for section in TAGGED for name in TAGGED_SECTIONS[section]]


@pytest.fixture(autouse=True, scope="module")
def _resolvers() -> None:
    train_gpt_apo.register_resolvers()


@cache
def _composed() -> DictConfig:
    with hydra.initialize_config_dir(str(conf_dir() / "aligner"), version_base=None):
        return hydra.compose("gpt_apo", ["+recipe=qwen2.5_7b"])


@pytest.fixture
def config(tmp_path: Path) -> DictConfig:
    """A configuration that passes every rule: two data-parallel ranks of four tensor ranks."""
    for name in ("model.nemo", "prompts.jsonl"):
        (tmp_path / name).write_text("{}\n")
    prompts = str(tmp_path / "prompts.jsonl")
    config = copy.deepcopy(_composed())
    config.pretrained_checkpoint.restore_from_path = str(tmp_path / "model.nemo")
    config.model.data.data_prefix = {"train": [prompts], "validation": [prompts]}
    return config


def changed(config: DictConfig, **changes: Any) -> DictConfig:
    for key, value in changes.items():
        OmegaConf.update(config, key, value, force_add=True)
    return config


def apo_section(**changes: Any) -> dict[str, Any]:
    return OmegaConf.to_container(changed(OmegaConf.create(BLOCK.shipped()), **changes))


def test_as_shipped_it_is_the_default() -> None:
    assert read_settings(BLOCK.shipped()) == ApoSettings()
    assert read_settings({}) == ApoSettings()
    assert read_settings(OmegaConf.create(BLOCK.shipped())) == ApoSettings()


@pytest.mark.parametrize(("section", "name"), NAMED)
def test_a_name_alone_is_the_class_with_its_defaults(section: str, name: str) -> None:
    read = read_settings(apo_section(**{f"{section}.name": name}))
    assert getattr(read, section) == TAGGED_SECTIONS[section][name]


@pytest.mark.parametrize("section", TAGGED)
def test_a_shipped_value_is_the_default_of_every_class_that_has_its_key(section: str) -> None:
    values = BLOCK.shipped()[section]
    assert values.keys() == set(BLOCK.schema.keys_of(section)), "all keys, and no other"
    for key, value in values.items():
        if key == "name" or value is None:
            continue
        defaults = [vars(c)[key] for c in TAGGED_SECTIONS[section].values() if key in vars(c)]
        assert defaults == [value] * len(defaults), key


def test_untagged_sections_are_shipped_whole() -> None:
    for field in fields(ApoSettings):
        section = getattr(ApoSettings(), field.name)
        if field.name not in TAGGED and field.name not in ("vocab_size", "prefix"):
            assert BLOCK.shipped()[field.name] == vars(section), field.name


def test_null_is_the_default_of_the_class() -> None:
    apo = read_settings(apo_section(**{"schedule.name": "ess", "schedule.rho": None}))
    assert apo.schedule.rho == TAGGED_SECTIONS["schedule"]["ess"].rho
    apo = read_settings(apo_section(**{"schedule.alpha_min": None}))
    assert apo.schedule == TAGGED_SECTIONS["schedule"]["guarded"]


def test_a_key_of_another_class_may_stay_as_shipped_or_become_null() -> None:
    fixed = TAGGED_SECTIONS["schedule"]["fixed"]
    chosen = {"schedule.name": "fixed", "schedule.alpha_min": None, "schedule.max_change": 0.05}
    assert read_settings(apo_section(**chosen)).schedule == fixed


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"schedule.name": "fixed", "schedule.alpha_min": 0.4},
            ["model.apo.schedule.alpha_min=0.4", "schedule=fixed has no", "guarded, ess have"],
        ),
        ({"objective.gate_positive": 2.0}, ["objective=apo has no gate_positive", "sapo has"]),
        ({"schedule.alpha_mim": 0.4}, ["no such key", "model.apo.schedule.alpha_min"]),
        ({"shedule.name": "fixed"}, ["model.apo.shedule", "no such key", "model.apo.schedule"]),
        ({"objective.name": "gpso"}, ["model.apo.objective.name=gpso", "must be one of", "gspo"]),
        ({"schedule.alpha_min": "low"}, ["model.apo.schedule.alpha_min=low", "a number"]),
        ({"schedule.alpha_min": 0.95}, ["model.apo.schedule.alpha_min", "0.95"]),
        ({"anchor.name": "ema"}, ["model.apo.anchor.name", "old, reference", "ema"]),
        ({"update.max_skipped_steps": 0}, ["model.apo.update.max_skipped_steps", "at least 1"]),
        ({"resume.without_state": "no"}, ["model.apo.resume.without_state", "error, fresh"]),
        ({"vocab_size": 1}, ["model.apo.vocab_size=1", "at least 2"]),
        ({"schedule": "ess"}, ["model.apo.schedule=ess", "is a section"]),
    ],
)
def test_what_is_wrong_with_a_setting(changes: dict[str, Any], said: list[str]) -> None:
    with pytest.raises(ConfigError) as error:
        read_settings(apo_section(**changes))
    assert all(part in str(error.value) for part in said), str(error.value)


def test_a_missing_section_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"model\.apo=null: is missing"):
        read_settings(None)


def test_the_shipped_recipe_passes(config: DictConfig) -> None:
    assert train_gpt_apo.check(config) == ApoSettings()


GRPO, MODEL = "trainer.grpo.", "model."
BACKEND = f"{GRPO}inference_backend."
SAMPLING = f"{MODEL}grpo.sampling_params."
RULES: list[tuple[dict[str, Any], str]] = [
    # groups
    ({GRPO + "samples_per_prompt": 1}, "samples_per_prompt=1: a group needs at least 2"),
    ({MODEL + "global_batch_size": 40}, "=40: must be a multiple of trainer.grpo.samples_per"),
    ({MODEL + "global_batch_size": 384}, "=384: must divide the rollout"),
    ({GRPO + "batch_iterator.use_flask": True}, "use_flask=True: .*cannot form groups"),
    ({GRPO + "model_gbs": 128}, "model_gbs=128: must be the model's own, 256"),
    ({GRPO + "model_mbs": 2}, "model_mbs=2: must be the model's own, 1"),
    # passes over what a rank holds
    ({GRPO + "generation_rollout_mbs": 5}, "=5: must be a multiple of .*prompt_micro_batch_size"),
    ({GRPO + "generation_rollout_mbs": 24}, "=24: .*must (divide|be a multiple)"),
    ({MODEL + "grpo.forward_micro_batch_size": 3}, "=3: must divide the .* that a rank reads"),
    ({GRPO + "val_num_prompts_per_grpo_step": 7}, "val_num_prompts_per_grpo_step=7: times samples"),
    ({MODEL + "grpo.length_params.max_length": 5000}, "=5000: must be less than model.encoder_seq"),
    # keys that nothing reads
    ({GRPO + "gradient_clip": 0.1}, "gradient_clip: there is no such key; .*gradient_clip_val"),
    ({MODEL + "grpo.ratio_epsilon": 0.1}, "ratio_epsilon: there is no such key; .*ratio_eps"),
    # sampling
    ({SAMPLING + "temperature": 0.7}, r"temperature=0\.7: must be 1\.0"),
    ({SAMPLING + "top_k": 50}, "top_k=50: must be -1 or 0"),
    ({SAMPLING + "top_p": 0.9}, r"top_p=0\.9"),
    ({SAMPLING + "repetition_penalty": 1.2}, r"repetition_penalty=1\.2"),
    ({SAMPLING + "use_greedy": True}, "use_greedy=True: must be False"),
    # optimizer
    ({GRPO + "gradient_clip_val": 0.0}, r"gradient_clip_val=0\.0: must be > 0"),
    ({GRPO + "gradient_clip_val": None}, "gradient_clip_val=None: must be > 0"),
    ({MODEL + "optim.name": "mcore_distributed_optim"}, "mcore_distributed_optim: clips inside"),
    ({MODEL + "optim.name": "megatron_fused_adam"}, "megatron_fused_adam: clips inside"),
    ({MODEL + "optim.overlap_param_sync": True}, "overlap_param_sync=True: must be false"),
    # rewards
    ({GRPO + "length_penalty_enabled": True}, "length_penalty_enabled=True: shapes rewards"),
    ({GRPO + "dapo.length_penalty": True}, r"dapo\.length_penalty=True: shapes rewards"),
    # sampler
    ({BACKEND + "enable": False}, "enable=False: .*use true"),
    ({BACKEND + "type": "trt_llm"}, "type=trt_llm: is broken"),
    ({BACKEND + "type": "sglang"}, "type=sglang: must be one of vllm, trt_llm_pytorch"),
    ({BACKEND + "type": "trt_llm_pytorch"}, "type=trt_llm_pytorch: .*enabled are: vllm$"),
    ({BACKEND + "config.trt_llm.enable": True}, "type=vllm: .*enabled are: trt_llm, vllm$"),
    ({BACKEND + "config.vllm.enable": False}, "type=vllm: .*enabled are: none$"),
    ({MODEL + "grpo.inference_backend": {"type": "vllm"}}, "differs from trainer.grpo.inference_"),
    ({MODEL + "peft.peft_scheme": "lora"}, "peft_scheme=lora: must be none: .*no adapter"),
    ({MODEL + "context_parallel_size": 2}, "context_parallel_size=2: needs .*reshard=true"),
    # layout
    ({MODEL + "tensor_model_parallel_size": 3}, "tensor_model_parallel_size=3 x .* must divide"),
    ({MODEL + "micro_batch_size": 3}, "=256: must be a multiple of data-parallel size x micro"),
    (
        {GRPO + "num_prompts_per_grpo_step": 17, MODEL + "global_batch_size": 272},
        "num_prompts_per_grpo_step=17: must be a multiple of the data-parallel size=2",
    ),
    # model
    ({MODEL + "qk_layernorm": True}, "tensor_model_parallel_size=4: needs model.sequence_parallel"),
    ({MODEL + "qk_layernorm": True, MODEL + "mcore_gpt": False}, "mcore_gpt=False: has no norms"),
    # files
    ({"pretrained_checkpoint.restore_from_path": None}, "restore_from_path=None: must name"),
    ({"pretrained_checkpoint.restore_from_path": "/no/such"}, "restore_from_path=/no/such: must"),
    ({MODEL + "data.data_prefix": None}, "data_prefix.train=None: must be a list of one"),
    ({MODEL + "data.data_prefix.train": ["a", "b"]}, r"data_prefix\.train=\['a', 'b'\]: must"),
    ({MODEL + "data.data_prefix.validation": ["/no/such"]}, r"validation=\['/no/such'\]: must"),
    # sizes that are no numbers
    ({GRPO + "samples_per_prompt": None}, "samples_per_prompt=None: must be a whole number"),
    ({"trainer.devices": "auto"}, r"trainer\.devices=auto: must be a whole number"),
    ({MODEL + "micro_batch_size": 0}, "micro_batch_size=0: must be a whole number of at least 1"),
]


@pytest.mark.parametrize(("changes", "said"), RULES, ids=lambda value: str(value)[:60])
def test_what_is_wrong_with_a_configuration(
    changes: dict[str, Any], said: str, config: DictConfig
) -> None:
    with pytest.raises(ConfigError, match=said):
        train_gpt_apo.check(changed(config, **changes))


@pytest.mark.parametrize("key", ["trainer.grpo", "model.optim", "model.grpo.sampling_params"])
def test_a_section_that_is_not_there_is_named(key: str, config: DictConfig) -> None:
    section, _, name = key.rpartition(".")
    OmegaConf.set_struct(config, False)
    del OmegaConf.select(config, section)[name]
    OmegaConf.set_struct(config, True)
    with pytest.raises(ConfigError, match=key):
        train_gpt_apo.check(config)


@pytest.mark.parametrize(
    "changes",
    [
        {MODEL + "qk_layernorm": True, MODEL + "sequence_parallel": True},
        {MODEL + "qk_layernorm": True, MODEL + "tensor_model_parallel_size": 1},
        {MODEL + "context_parallel_size": 2, BACKEND + "reshard": True},
        {
            BACKEND + "type": "trt_llm_pytorch",
            BACKEND + "config.trt_llm_pytorch.enable": True,
            BACKEND + "config.vllm.enable": False,
        },
        {SAMPLING + "top_k": 0},
    ],
    ids=lambda value: str(value)[:60],
)
def test_what_is_allowed(changes: dict[str, Any], config: DictConfig) -> None:
    train_gpt_apo.check(changed(config, **changes))


# The objective, a host key that restates it, what it may say, and what it may not.
RESTATED = [
    ("apo", "trainer.grpo.initial_policy_kl_penalty", 0.0, 0.01),
    ("apo", "trainer.grpo.use_leave_one_out_baseline", False, True),
    ("apo", "trainer.grpo.normalize_rewards", True, False),
    ("dr_grpo", "trainer.grpo.normalize_rewards", False, True),
    ("apo", "trainer.grpo.importance_sample_correct", False, True),
    ("apo", "model.grpo.initial_policy_kl_penalty", 0.0, 0.01),
    ("apo", "model.grpo.entropy_bonus", 0.0, 0.1),
    ("grpo", "model.grpo.ratio_eps", 0.2, 0.3),
    ("grpo", "model.grpo.ratio_eps_low", 0.2, 0.1),
    ("dapo", "model.grpo.ratio_eps_high", 0.28, 0.2),
    ("dapo", "model.grpo.dapo.token_loss", True, False),
    ("dapo", "model.grpo.dapo.clip_higher", True, False),
    ("grpo", "model.grpo.dapo.clip_higher", False, True),
]


@pytest.mark.parametrize(("objective", "key", "same", "other"), RESTATED)
def test_a_key_that_restates_the_objective(
    objective: str, key: str, same: Any, other: Any, config: DictConfig
) -> None:
    changed(config, **{"model.apo.objective.name": objective})
    for value in (None, same):
        train_gpt_apo.check(changed(config, **{key: value}))
    rule = f"{key}={other}: contradicts objective={objective}, for which it is {same}"
    with pytest.raises(ConfigError) as error:
        train_gpt_apo.check(changed(config, **{key: other}))
    assert str(error.value).startswith(rule)


def test_every_restated_key_is_tested_and_shipped(config: DictConfig) -> None:
    restated = host_rules.restated(ApoSettings().objective, ApoSettings().regularizers)
    assert restated.keys() == {key for _, key, _, _ in RESTATED}
    assert all(OmegaConf.select(config, key) is None for key in restated)


@pytest.mark.parametrize("key", ["ratio_eps", "ratio_eps_low", "ratio_eps_high"])
def test_a_key_that_means_nothing_to_the_objective(key: str, config: DictConfig) -> None:
    with pytest.raises(ConfigError, match=f"{key}=0.2: has no meaning under objective=apo"):
        train_gpt_apo.check(changed(config, **{f"model.grpo.{key}": 0.2}))


@pytest.mark.parametrize(
    ("prompts", "changes", "steps"),
    [
        (12_000, {}, 187 * 4),
        (12_000, {GRPO + "max_epochs": 2}, 2 * 187 * 4),
        (12_000, {GRPO + "max_steps": 50}, 50 * 4),
        (12_000, {MODEL + "global_batch_size": 1024}, 187),
    ],
)
def test_the_learning_rate_is_told_the_optimizer_steps_of_the_run(
    prompts: int, changes: dict[str, Any], steps: int, config: DictConfig
) -> None:
    config = changed(config, **changes)
    assert host_rules.optimizer_steps(config, prompts) == steps
    # Four times the ranks, the same run.
    assert host_rules.optimizer_steps(changed(config, **{"trainer.num_nodes": 4}), prompts) == steps


@pytest.mark.parametrize(
    ("prompts", "changes", "said"),
    [
        (63, {}, "max_steps=-1: leaves no RL step: the training data hold 63 prompts"),
        (
            128,
            {},
            r"sched=CosineAnnealing: warmup_steps \+ constant_steps=10 must be less than .*8",
        ),
        (128, {MODEL + "optim.sched.warmup_steps": 8}, "=8 must be less than the run's 8"),
    ],
)
def test_a_run_too_short_for_its_learning_rate_is_refused(
    prompts: int, changes: dict[str, Any], said: str, config: DictConfig
) -> None:
    with pytest.raises(ConfigError, match=said):
        host_rules.optimizer_steps(changed(config, **changes), prompts)


def test_a_task_without_a_grader_is_refused() -> None:
    graders = dict.fromkeys(train_gpt_apo.ENVIRONMENT_OF_TASK)
    train_gpt_apo.check_tasks("train", {"math", "code"}, graders)
    with pytest.raises(ConfigError, match="task_name=chess, go: holds prompts of tasks"):
        train_gpt_apo.check_tasks("train", {"math", "go", "chess"}, graders)


def test_every_task_has_a_section_of_servers(config: DictConfig) -> None:
    sections = set(train_gpt_apo.ENVIRONMENT_OF_TASK.values())
    assert sections == set(config.trainer.grpo.environments)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model.grpo.dapo.token_loss": True}, "model.grpo.dapo.token_loss=True: contradicts"),
        ({"model.global_batch_size": 40}, "model.global_batch_size=40: must be a multiple"),
        ({"model.apo": None}, "model.apo=null: is missing"),
    ],
)
def test_a_mistake_ends_with_status_2_and_one_line(
    changes: dict[str, Any], said: str, config: DictConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as left:
        train_gpt_apo.main(changed(config, **changes))
    assert left.value.code == 2
    captured = capsys.readouterr()
    assert captured.err.startswith(f"nemo-apo: {said}")
    assert captured.err.count("\n") == 1
    assert captured.out == ""


@pytest.mark.parametrize("variable", ["RANK", "SLURM_PROCID"])
def test_only_the_first_rank_says_why(
    variable: str,
    config: DictConfig,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv(variable, "3")
    with pytest.raises(SystemExit) as left:
        train_gpt_apo.main(changed(config, **{"model.global_batch_size": 40}))
    assert left.value.code == 2
    assert capsys.readouterr().err == ""


@pytest.fixture
def started(tmp_path: Path) -> Iterator[Any]:
    """Starts the command line; whatever still runs at the end is killed."""
    processes: list[subprocess.Popen[str]] = []
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))

    def start(arguments: Sequence[str]) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-m", "nemo_apo.aligner.train_gpt_apo", *arguments],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": path},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        processes.append(process)
        return process

    yield start
    for process in processes:
        process.kill()
        process.wait()


def last_line(text: str) -> str:
    return text.strip().splitlines()[-1]


@pytest.mark.pinned
def test_the_command_line(started: Any, tmp_path: Path) -> None:
    own = tmp_path / "own"
    own.mkdir()
    (own / "mine.yaml").write_text("model: {apo: {schedule: {alpha_min: 0.25}}}\n")
    misspelt = started(["++model.apo.schedule.alpha_mim=0.4"])
    printed = started(["++model.apo.schedule.alpha_min=0.4", "+recipe=qwen3_8b", "--cfg", "job"])
    _, error = misspelt.communicate(timeout=240)
    assert misspelt.returncode == 2
    assert last_line(error).startswith("nemo-apo: model.apo.schedule.alpha_mim=0.4: there is no")
    assert "did you mean model.apo.schedule.alpha_min" in last_line(error)
    assert "Traceback" not in error
    out, _ = printed.communicate(timeout=240)
    assert printed.returncode == 0
    job = OmegaConf.create(out)
    assert job.model.apo.schedule.alpha_min == 0.4
    assert job.model.hf_model_name_or_configs_dir == "Qwen/Qwen3-8B"
    chosen = started(["--config-path", str(own), "--config-name", "mine", "--cfg", "job"])
    out, _ = chosen.communicate(timeout=240)
    assert OmegaConf.create(out).model.apo.schedule.alpha_min == 0.25
    assert sorted(path.name for path in tmp_path.iterdir()) == ["own"], "nothing is written"


@pytest.mark.released
def test_without_the_branch_it_says_what_is_missing(started: Any, tmp_path: Path) -> None:
    prompts, model = tmp_path / "prompts.jsonl", tmp_path / "model.nemo"
    for path in (prompts, model):
        path.write_text("{}\n")
    process = started(
        [
            f"pretrained_checkpoint.restore_from_path={model}",
            f"model.data.data_prefix={{train: [{prompts}], validation: [{prompts}]}}",
        ]
    )
    _, error = process.communicate(timeout=240)
    assert process.returncode == 2
    said = last_line(error)
    assert "nemo_aligner.experimental.grpo" in said
    assert "cannot be imported" in said
    assert "tested with NeMo-Aligner branch llama-nemotron-dev" in said
    assert "Traceback" not in error


QWQ = ("c4", "c7", "olymp_pr_gt03", "olymp_pr_lt03")
JUDGED = ("gpqa", "scp116k", "supergpqa", "aime24", "aime25")
PROMPTS, GROUP, ANSWER, RL_STEPS = 4, 4, 6, 2


def save_tiny_model(rank: int, folder: str) -> None:
    """A model folder as NeMo leaves one behind, its configuration without our section."""
    import torch

    from nemo_apo.aligner.grpo import ApoGRPOActor
    from tests.aligner import tiny_actor

    config = tiny_actor.tiny_config("grpo", qk_layernorm=True)
    config.apo = {}
    actor = tiny_actor.build("grpo", config, 1, ApoGRPOActor).actor
    torch.save(actor.state_dict(), f"{folder}/model_weights.ckpt")
    own = {key: value for key, value in config.items() if key not in ("grpo", "apo", "optim")}
    OmegaConf.save(OmegaConf.create(own), f"{folder}/model_config.yaml")


def run_config(folder: str) -> DictConfig:
    """A run of one CPU rank, composed as the command line would."""
    train_gpt_apo.register_resolvers()
    values = {
        "pretrained_checkpoint.restore_from_path": f"{folder}/model",
        "exp_manager.explicit_log_dir": f"{folder}/log",
        "exp_manager.create_checkpoint_callback": False,
        "+exp_manager.create_tensorboard_logger": False,
        "+exp_manager.log_tflops_per_sec_per_gpu": False,
        "trainer.devices": 1,
        "trainer.accelerator": "cpu",
        "trainer.precision": 32,
        "trainer.grpo.max_steps": RL_STEPS,
        "trainer.grpo.val_check_interval": 2,
        "trainer.grpo.save_interval": 0,
        "trainer.grpo.run_validation_step_0": False,
        "trainer.grpo.num_prompts_per_grpo_step": PROMPTS,
        "trainer.grpo.samples_per_prompt": GROUP,
        "trainer.grpo.generation_rollout_mbs": 4,
        "trainer.grpo.prompt_micro_batch_size": 1,
        "trainer.grpo.val_prompt_micro_batch_size": 1,
        "trainer.grpo.val_num_prompts_per_grpo_step": 2,
        "trainer.grpo.val_samples_per_prompt": 4,
        "model.precision": 32,
        "model.micro_batch_size": 4,
        "model.global_batch_size": 8,
        "model.encoder_seq_length": 64,
        "model.transformer_engine": False,
        "model.megatron_amp_O2": False,
        "model.grpo.forward_micro_batch_size": 4,
        "model.grpo.offload_adam_states": False,
        "model.grpo.length_params.max_length": ANSWER,
        "model.data.data_prefix": f"{{train: [{folder}/prompts], validation: [{folder}/prompts]}}",
        "model.data.apply_chat_template": False,
        "model.data.prompt_file": f"{folder}/template",
    }
    sched = "{name: CosineAnnealing, warmup_steps: 1, constant_steps: 0, min_lr: 0.001}"
    overrides = ["~model.optim", f"+model.optim={{name: sgd, lr: 0.01, sched: {sched}}}"]
    overrides += [f"{key}={value}" for key, value in values.items()]
    with hydra.initialize_config_dir(str(conf_dir() / "aligner"), version_base=None):
        return hydra.compose("gpt_apo", overrides)


def sampling_actor_class() -> type:
    """The APO actor with a backend of the test's own, and local layers, which no sampler knows."""
    from nemo_apo.aligner.grpo import ApoGRPOActor
    from tests.aligner import tiny_actor

    host_class = tiny_actor.real_actor_class("grpo")
    assert issubclass(ApoGRPOActor, host_class)

    class SamplingActor(ApoGRPOActor):
        def _initialize_inference_backend(self, backend_type: str) -> Any:
            return Backend()

        def prepare_for_inference(self) -> None:
            # As without a backend: there is nothing to be refitted, nor any CUDA to do it with.
            backend, self.inference_backend = self.inference_backend, None
            for name in ("_grad_buffers", "_grads_buckets", "_params_buckets", "_param_buffers"):
                vars(self._optimizer).setdefault(name, {})
            host_class.prepare_for_inference(self)
            self.inference_backend = backend

        def finish_inference(self) -> None:
            backend, self.inference_backend = self.inference_backend, None
            super().finish_inference()
            self.inference_backend = backend

    return SamplingActor


class Backend:
    """Stands for the sampler: random answers of full length."""

    def __init__(self) -> None:
        import torch

        self.draw = torch.Generator().manual_seed(0)

    def generate(self, inputs: Any, use_greedy: bool = False) -> dict[str, Any]:
        import torch

        prompts, lengths = inputs
        tokens = prompts.clone()
        for row, length in enumerate(lengths.tolist()):
            answer = torch.randint(33, 127, (ANSWER,), generator=self.draw)
            tokens[row, length : length + ANSWER] = answer
        return {
            "response_tokens": tokens,
            "response_lengths": lengths + ANSWER,
            "response_logprobs_trt": torch.zeros(tokens.shape),
        }

    def free(self) -> None:
        pass


def graders(servers: DictConfig) -> dict[str, Any]:
    """One grader: the share of an answer's characters that come before Q."""
    import torch
    from nemo_aligner.experimental.grpo.experience.interfaces import EnvironmentInterface

    assert "math" in servers

    class Grader(EnvironmentInterface):
        def start_step(self, interactions: Any, metadata: Any, *_: Any, **__: Any) -> Any:
            answers = ["".join(turns[1:]) for turns in interactions]
            return [sum(letter < "Q" for letter in answer) / ANSWER for answer in answers]

        def finish_step(self, future: Any, *_: Any, **__: Any) -> Any:
            return None, None, torch.tensor(future), torch.ones(len(future))

        def global_post_process_and_metrics(self, batch: Any) -> Any:
            return batch, {}

    return {"math": Grader()}


def stand_in_for_packages() -> None:
    """What the host imports to read data and to call graders; here only the first is called."""

    def open_lines(path: str) -> Any:
        lines = Path(path).read_text().splitlines()
        return contextlib.nullcontext([json.loads(line) for line in lines])

    needed: dict[str, dict[str, Any]] = {
        "jsonlines": {"open": open_lines},
        "datasets": {"load_dataset": None, "builder": ModuleType("datasets.builder")},
        "pytriton": {"client": ModuleType("pytriton.client")},
    }
    for name, parts in needed.items():
        if importlib.util.find_spec(name) is not None:
            continue
        sys.modules[name] = ModuleType(name)
        vars(sys.modules[name]).update(parts)
        if name == "pytriton":
            parts["client"].FuturesModelClient = None
            sys.modules["pytriton.client"] = parts["client"]


def launched(rank: int, folder: str) -> dict[str, Any]:
    """Launch a run whose sampler and graders are ours; what it logged and what it left."""
    stand_in_for_packages()
    config = run_config(folder)
    train_gpt_apo.check(config)
    train_gpt_apo.check_host_is_known()
    made = train_gpt_apo.environments(config.trainer.grpo.environments)
    trainer = train_gpt_apo.run(
        config,
        actor_class=sampling_actor_class(),
        make_environments=graders,
    )
    parameters = dict(trainer.model.model.named_parameters())
    reference = trainer.model.init_policy_state_dict
    moved = {
        name: float((value - reference[f"model.{name}"]).abs().max())
        for name, value in parameters.items()
    }
    texts = Path(config.trainer.grpo.generation_save_dir, "train_0.jsonl").read_text()
    return {
        "moved": moved,
        "step": trainer.step,
        "rl_steps": trainer.model.apo_state.rl_steps,
        "learning_rate_steps": trainer.scheduler.max_steps,
        "answers": texts.count("\n"),
        "environments": {task: type(grader).__name__ for task, grader in made.items()},
    }


@pytest.mark.pinned
@pytest.mark.branch
def test_a_run_from_a_saved_model_to_the_last_step(tmp_path: Path) -> None:
    from tests.aligner.host_ranks import run_ranks

    (tmp_path / "model").mkdir()
    (tmp_path / "template").write_text("{}")
    lines = [{"task_name": "math", "text": f"{n}+1=", "args": {"answer": "0"}} for n in range(16)]
    (tmp_path / "prompts").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    run_ranks(1, save_tiny_model, str(tmp_path / "model"))
    [found] = run_ranks(1, launched, str(tmp_path))
    assert found["step"] == found["rl_steps"] == RL_STEPS
    assert found["learning_rate_steps"] == RL_STEPS * 2, "two optimizer steps per RL step"
    assert found["answers"] == RL_STEPS * PROMPTS * GROUP
    assert sum("q_layernorm" in name or "k_layernorm" in name for name in found["moved"]) == 4
    assert all(change > 0.0 for change in found["moved"].values())
    assert found["environments"] == {
        **dict.fromkeys(("aime24", "amc23", "math"), "MathEnvironment"),
        **{f"qwq_sol_gen_no_ans_{name}": "MathEnvironment" for name in QWQ},
        **{f"llm_judge_{name}": "LLMJudgeEnvironment" for name in JUDGED},
        "code": "CodeEnvironment",
        "reward_model": "RewardModelEnvironment",
        "genrm": "GenRMEnvironment",
    }
