"""The steps of a launched run, on stand-ins for all that they call of NeMo-RL.

The same steps with the real ones are in the test_host_* files.
"""

import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from omegaconf import OmegaConf

from nemo_apo.config import ConfigError
from nemo_apo.nemo_rl import interface_guard, run_grpo
from nemo_apo.nemo_rl.baselines import ApoLogger
from nemo_apo.nemo_rl.loss import ApoLoss
from nemo_apo.nemo_rl.policy import ApoPolicyMixin
from nemo_apo.nemo_rl.settings import read_settings
from nemo_apo.plugin.interface_guard import Needed
from tests.nemo_rl.example_config import NEEDED, example

TOKENIZER = ["a", "b", "c"]
DATASET, VAL_DATASET = range(100), range(10)
ENVIRONMENTS, VAL_ENVIRONMENTS = {"math": "environment"}, {"math": "held out"}


class Policy:
    """Stands for the host's."""

    def __init__(self, **kwargs: Any) -> None:
        self.kwargs = kwargs


class Checkpointer:
    """Of main: it has to be left, for what it saves in the background."""

    def __init__(self, events: list[str]) -> None:
        self.events = events

    def __enter__(self) -> None:
        self.events.append("checkpointer in")

    def __exit__(self, *error: object) -> None:
        self.events.append("checkpointer out")


class Checkpoints:
    """Stands for the host's manager of the folder that its configuration names."""

    def __init__(self, config: dict[str, Any]) -> None:
        self.folder = Path(config["checkpoint_dir"])

    def get_latest_checkpoint_path(self) -> str | None:
        return str(self.folder / "step_7") if self.folder.exists() else None

    def get_resume_paths(self, last_checkpoint_path: str | None) -> tuple[Path | None, None]:
        return last_checkpoint_path and Path(last_checkpoint_path) / "policy" / "weights", None


class Host:
    """What was called of it.

    Attributes:
        events: in order.
        trained: the arguments of ``grpo_train``.
        fails: whether that raises, and whether the sampler does when it is shut down.
    """

    def __init__(self, is_main: bool) -> None:
        self.events: list[str] = []
        self.trained: dict[str, Any] = {}
        self.fails = False
        self.is_main = is_main
        self.resumed = SimpleNamespace(total_steps=7)

    def saw(self, event: str, result: Any = None) -> Any:
        self.events.append(event)
        return result

    def master_config(self, **config: Any) -> Any:
        return SimpleNamespace(**config)

    def setup(
        self,
        master_config: Any,
        tokenizer: Any,
        dataset: Any,
        val_dataset: Any,
        policy_factory: Any,
    ) -> tuple[Any, ...]:
        self.saw(f"setup with {master_config.policy['generation']}")
        assert (tokenizer, dataset, val_dataset) == (TOKENIZER, DATASET, VAL_DATASET)
        policy = policy_factory(cluster="cluster", tokenizer=TOKENIZER, weights_path=None)
        checkpointer = Checkpointer(self.events) if self.is_main else object()
        again = SimpleNamespace(of_setup=True)
        return (
            *(policy, self, None, "clusters", "loader", "val loader", "loss", "logger"),
            *(checkpointer, self.resumed, again, {}, {}),
        )

    def grpo_train(self, **arguments: Any) -> None:
        self.saw("train")
        self.trained = arguments
        if self.fails:
            raise RuntimeError("lost a worker")

    def shutdown_environments(self, *environments: Any) -> None:
        assert environments == (ENVIRONMENTS, VAL_ENVIRONMENTS)
        self.saw("environments out")

    def shutdown(self) -> None:
        self.saw("sampler out")
        if self.fails:
            raise RuntimeError("was gone already")

    def functions(self) -> dict[str, Any]:
        """By their dotted names."""
        names = {
            "algorithms.grpo.MasterConfig": self.master_config,
            "algorithms.grpo.setup": self.setup,
            "algorithms.grpo.grpo_train": self.grpo_train,
            "utils.logger.get_next_experiment_dir": self.folder,
            "distributed.virtual_cluster.init_ray": lambda: self.saw("ray"),
            "algorithms.utils.get_tokenizer": lambda section: self.saw(section, TOKENIZER),
            "models.generation.configure_generation_config": self.generation,
            "data.utils.setup_response_data": self.data,
            "models.policy.lm_policy.Policy": Policy,
            "utils.checkpoint.CheckpointManager": Checkpoints,
        }
        if self.is_main:
            names["algorithms.grpo.shutdown_environments"] = self.shutdown_environments
        return names

    def folder(self, base_log_dir: str) -> str:
        return self.saw(base_log_dir, f"{base_log_dir}/1")

    def generation(self, section: Any, tokenizer: Any, **flags: bool) -> str:
        assert (section["backend"], tokenizer) == ("vllm", TOKENIZER)
        assert flags == {"has_refit_draft_weights": False, "trains_mtp": False}
        return self.saw("generation", "complete generation")

    def data(self, tokenizer: Any, data: Any, environments: Any) -> tuple[Any, ...]:
        assert (tokenizer, data, environments) == (TOKENIZER, {"name": "math"}, {"math": {}})
        return self.saw("data", (DATASET, VAL_DATASET, ENVIRONMENTS, VAL_ENVIRONMENTS))


@pytest.fixture(params=[True, False], ids=["main", "0.7.0"])
def host(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Host:
    host = Host(request.param)
    for name in [name for name in sys.modules if name.split(".")[0] == "nemo_rl"]:
        monkeypatch.delitem(sys.modules, name)
    for name, function in host.functions().items():
        parts = ["nemo_rl", *name.split(".")]
        for end in range(1, len(parts)):
            module = ".".join(parts[:end])
            if module not in sys.modules:
                monkeypatch.setitem(sys.modules, module, ModuleType(module))
        setattr(sys.modules[".".join(parts[:-1])], parts[-1], function)
    for name in [name for name in sys.modules if name.startswith("nemo_rl.")]:
        above, _, last = name.rpartition(".")
        setattr(sys.modules[above], last, sys.modules[name])
    return host


def config() -> dict[str, Any]:
    changed = OmegaConf.create(example())
    others = {"data": {"name": "math"}, "env": {"math": {}}, "policy.tokenizer": "tokenizer"}
    for key, value in (NEEDED | others).items():
        OmegaConf.update(changed, key, value, merge=False, force_add=True)
    return OmegaConf.to_container(changed, resolve=True)


BEFORE = ["logs", "ray", "tokenizer", "generation", "data", "setup with complete generation"]


def test_the_steps_are_those_of_the_hosts_script(host: Host) -> None:
    run_grpo.run(config(), read_settings(None))
    if host.is_main:
        last = ["checkpointer out", "environments out", "sampler out"]
        assert host.events == [*BEFORE, "checkpointer in", "train", *last]
    else:
        assert host.events == [*BEFORE, "train"]


def test_what_training_gets(host: Host) -> None:
    settings = read_settings({"objective": {"name": "gspo"}, "regularizers": {"kl_coef": 0.1}})
    run_grpo.run(config(), settings)
    given = host.trained
    policy, loss, logger = given["policy"], given["loss_fn"], given["logger"]
    assert isinstance(policy, ApoPolicyMixin)
    assert isinstance(policy, Policy)
    assert policy.apo.settings == settings
    assert policy.apo.sizes.group_size == 16
    assert policy.apo.sizes.total_steps == 3, "100 prompts, 32 of them per step"
    assert policy.apo.sizes.max_response_length == 512
    assert isinstance(loss, ApoLoss)
    assert (loss.objective, loss.regularizers) == (settings.objective, settings.regularizers)
    assert loss.use_fused_linear_logprobs is False
    assert isinstance(logger, ApoLogger)
    assert logger._baselines is policy.apo.baselines
    others = {"policy", "loss_fn", "logger", "checkpointer", "master_config"}
    assert {key: value for key, value in given.items() if key not in others} == {
        "policy_generation": host,
        "wrapped_dataloader": "loader",
        "val_dataloader": "val loader",
        "tokenizer": TOKENIZER,
        "task_to_env": ENVIRONMENTS,
        "val_task_to_env": VAL_ENVIRONMENTS,
        "grpo_save_state": host.resumed,
    }
    assert given["master_config"].of_setup


def test_the_loss_is_told_of_log_probs_without_logits(host: Host) -> None:
    fused = config()
    fused["policy"]["megatron_cfg"] |= {"enabled": True, "use_fused_linear_logprobs": True}
    run_grpo.run(fused, read_settings(None))
    assert host.trained["loss_fn"].use_fused_linear_logprobs is True


def test_a_checkpoint_without_our_state_is_refused_before_ray_starts(
    host: Host, tmp_path: Path
) -> None:
    (tmp_path / "step_7" / "policy").mkdir(parents=True)
    resuming = config() | {"checkpointing": {"checkpoint_dir": str(tmp_path)}}
    with pytest.raises(ConfigError, match=r"holds no APO state .*resume\.without_state=fresh"):
        run_grpo.run(resuming, read_settings(None))
    assert host.events == []
    run_grpo.run(resuming, read_settings({"resume": {"without_state": "fresh"}}))
    assert host.trained["policy"].apo.state.rl_steps == 0


def test_what_was_started_is_ended_when_training_fails(
    host: Host, capsys: pytest.CaptureFixture[str]
) -> None:
    host.fails = True
    with pytest.raises(RuntimeError, match="lost a worker"):
        run_grpo.run(config(), read_settings(None))
    if host.is_main:
        assert host.events[-3:] == ["checkpointer out", "environments out", "sampler out"]
        assert "the sampler did not shut down: was gone already" in capsys.readouterr().out


def test_all_that_the_steps_call_is_guarded() -> None:
    called = {f"nemo_rl.{name}" for name in Host(is_main=False).functions()}
    called -= {"nemo_rl.models.policy.lm_policy.Policy"}
    guarded = {f"{need.module}.{need.path.split('.')[0]}" for need in interface_guard.SCRIPT}
    assert called == guarded
    assert Needed("nemo_rl.algorithms.grpo", "MasterConfig") in interface_guard.SCRIPT
