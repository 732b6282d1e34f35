"""The plan's own configuration: a model, a cluster, a layout with gaps, a workload."""

import dataclasses
import functools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import OmegaConf

from nemo_apo.compose.files import conf_dir, group_options
from nemo_apo.compose.hf_model import with_checkpoint_shapes
from nemo_apo.compose.schema import Schema, assigned, shown, suggestion, typed_section, unknown_key
from nemo_apo.config import RECOMPUTE, Config, ConfigError, ModelConfig
from nemo_apo.config_rules import validate

# Bytes of a GPU's memory, by the manufacturer's figures.
GPU_MEMORY = {"h100": 80_000_000_000, "h200": 141_000_000_000}
ATTENTIONS = ("fused", "unfused", "gathered")
MODEL = "model"
# Keys of this section may be written without it: sequence_length=8192.
WORKLOAD = "workload"


def _at_least(minimum: int, section: str, values: object, *keys: str) -> None:
    for key in keys:
        value = getattr(values, key)
        if value is not None and value < minimum:
            raise ValueError(f"{section}.{key} must be at least {minimum}, got {value}")


def _share(key: str, value: float) -> None:
    if not 0.0 <= value < 1.0:
        raise ValueError(f"{key} must lie in [0, 1), got {value}")


def _one_of(key: str, value: str, choices: Sequence[str]) -> None:
    if value not in choices:
        raise ValueError(f"{key} must be one of {', '.join(choices)}, got {value!r}")


@dataclass(frozen=True)
class Cluster:
    """The machines.

    Attributes:
        nodes, gpus_per_node: how many.
        gpu: "h100" or "h200".
        reserve: share of a GPU's memory left to the CUDA context, communication buffers and
            fragmentation.
        nvlink_gb_per_s: of one GPU, one direction, inside a node.
        infiniband_gb_per_s: of one GPU's network port, one direction, between nodes.
    """

    nodes: int = 1
    gpus_per_node: int = 8
    gpu: str = "h100"
    reserve: float = 0.1
    nvlink_gb_per_s: float = 450.0
    infiniband_gb_per_s: float = 50.0

    def __post_init__(self) -> None:
        _at_least(1, "cluster", self, "nodes", "gpus_per_node")
        _one_of("cluster.gpu", self.gpu, list(GPU_MEMORY))
        _share("cluster.reserve", self.reserve)
        for key in ("nvlink_gb_per_s", "infiniband_gb_per_s"):
            if getattr(self, key) <= 0.0:
                raise ValueError(f"cluster.{key} must be > 0, got {getattr(self, key)}")

    @property
    def gpus(self) -> int:
        """GPUs in all."""
        return self.nodes * self.gpus_per_node

    @property
    def memory(self) -> int:
        """Bytes of one GPU."""
        return GPU_MEMORY[self.gpu]

    @property
    def usable(self) -> int:
        """Bytes of one GPU that training may fill."""
        return int(self.memory * (1.0 - self.reserve))


@dataclass(frozen=True)
class Parallel:
    """The layout; the plan fills in what is null. Data parallelism takes what is left.

    Attributes:
        tensor_model_parallel_size, pipeline_model_parallel_size, context_parallel_size: sizes.
        virtual_pipeline_model_parallel_size: model chunks per pipeline stage; null is one.
        sequence_parallel: norms and residuals are split over the tensor ranks; null is on wherever
            there are several.
        recompute: what the backward pass computes again: "none", "selective" (attention) or "full"
            (whole layers).
        distributed_optimizer: Adam's states are split over the data and context ranks.
    """

    tensor_model_parallel_size: int | None = None
    pipeline_model_parallel_size: int | None = None
    context_parallel_size: int | None = None
    virtual_pipeline_model_parallel_size: int | None = None
    sequence_parallel: bool | None = None
    recompute: str = "none"
    distributed_optimizer: bool = True

    def __post_init__(self) -> None:
        sizes = ("tensor_model", "pipeline_model", "context", "virtual_pipeline_model")
        _at_least(1, "parallel", self, *(f"{size}_parallel_size" for size in sizes))
        _one_of("parallel.recompute", self.recompute, RECOMPUTE)


@dataclass(frozen=True)
class Workload:
    """One optimizer step.

    Attributes:
        sequence_length: tokens of a sequence, prompt and completion, padding included.
        sequences: sequences of an optimizer step, on all GPUs together.
        micro_batch_size: sequences of one forward and backward.
        vocab_size: tokens that the model knows; null is what the model's file states.
        attention: "fused" (Transformer Engine's layers, scores never stored), "unfused"
            (megatron-core's local layers, scores stored, no context parallelism) or "gathered"
            (these with the trainer's attention, which gathers keys over the context ranks).
        reference_on_gpu: a second copy of the weights stays on the GPU.
    """

    sequence_length: int = 4096
    sequences: int = 512
    micro_batch_size: int = 1
    vocab_size: int | None = None
    attention: str = "fused"
    reference_on_gpu: bool = False

    def __post_init__(self) -> None:
        _at_least(1, WORKLOAD, self, "sequence_length", "sequences", "micro_batch_size")
        _at_least(2, WORKLOAD, self, "vocab_size")
        _one_of(f"{WORKLOAD}.attention", self.attention, ATTENTIONS)

    @property
    def has_local_layers(self) -> bool:
        """Whether the layers are megatron-core's in plain torch."""
        return self.attention != "fused"


@dataclass(frozen=True)
class Sampler:
    """The inference engine, where it keeps memory of the training GPUs while they train.

    Attributes:
        share: share of a GPU's memory that it keeps; 0 is an engine elsewhere, or one that gives
            its memory back.
        tensor_model_parallel_size: GPUs over which its weights are split; null is the trainer's.
    """

    share: float = 0.0
    tensor_model_parallel_size: int | None = None

    def __post_init__(self) -> None:
        _share("sampler.share", self.share)
        _at_least(1, "sampler", self, "tensor_model_parallel_size")


@dataclass(frozen=True)
class Question:
    """What a plan is asked for."""

    model: ModelConfig
    cluster: Cluster = field(default_factory=Cluster)
    parallel: Parallel = field(default_factory=Parallel)
    workload: Workload = field(default_factory=Workload)
    sampler: Sampler = field(default_factory=Sampler)

    @property
    def vocab_size(self) -> int:
        """Tokens that the model knows, without padding."""
        own = self.workload.vocab_size
        size = self.model.vocab_size if own is None else own
        if size is None:
            raise ConfigError(
                f"workload.vocab_size=null: must be set, as model={self.model.name} states none"
            )
        return size

    @property
    def number_bytes(self) -> int:
        """Bytes of a weight or of an activation."""
        return 2 if self.model.params_dtype == "bfloat16" else 4


SCHEMA = Schema(
    {
        MODEL: {"": ModelConfig()},
        "cluster": {"": Cluster()},
        "parallel": {"": Parallel()},
        WORKLOAD: {"": Workload()},
        "sampler": {"": Sampler()},
    }
)


# The shipped files do not change while a process runs.
@functools.cache
def model_names() -> tuple[str, ...]:
    """The options of ``model``."""
    return tuple(group_options()[MODEL])


def model_named(name: str) -> ModelConfig:
    """The model of a shipped file."""
    model: ModelConfig = typed_section(MODEL, _model_file(name), SCHEMA)
    return model


def read_question(overrides: Sequence[str]) -> Question:
    """The question that ``model=NAME`` and ``section.key=value`` arguments ask.

    Raises:
        ConfigError: naming key, value and rule, and for an unknown key or model the nearest one.
    """
    name: object = None
    values: dict[str, dict[str, Any]] = {section: {} for section in SCHEMA.defaults}
    for text in overrides:
        key, value = _parsed(text)
        if key == MODEL:
            name = value
            continue
        section, _, leaf = _full_key(key, value).partition(".")
        values[section][leaf] = value
    values[MODEL] = with_checkpoint_shapes({**_model_file(name), **values[MODEL]})
    question = Question(
        **{section: typed_section(section, given, SCHEMA) for section, given in values.items()}
    )
    validate(Config(model=question.model), 1)
    return question


def _model_file(name: object) -> dict[str, Any]:
    if name is None:
        raise ConfigError(f"model: must be chosen, one of {', '.join(model_names())}")
    if name not in model_names():
        rule = f"must be one of {', '.join(model_names())}{suggestion(shown(name), model_names())}"
        raise ConfigError(f"{assigned(MODEL, name)}: {rule}")
    values = OmegaConf.to_container(OmegaConf.load(conf_dir() / MODEL / f"{name}.yaml"))
    assert isinstance(values, dict)
    return {str(key): value for key, value in values.items()}


def _parsed(text: str) -> tuple[str, Any]:
    """Key and value of one argument."""
    key, equals, _ = text.partition("=")
    if not equals or key.startswith(("+", "~")):
        raise ConfigError(f"{text or 'empty argument'}: must be key=value{_near(key.lstrip('+~'))}")
    try:
        override = OverridesParser.create().parse_override(text)
    except HydraException:
        raise ConfigError(f"{text}: cannot be read, write key=value") from None
    if override.is_sweep_override() or override.package is not None:
        raise ConfigError(f"{text}: takes one value")
    return override.key_or_group, override.value()


def _full_key(key: str, value: object) -> str:
    if key in (own.name for own in dataclasses.fields(Workload)):
        return f"{WORKLOAD}.{key}"
    if key in SCHEMA.defaults:
        first = SCHEMA.keys_of(key)[0]
        raise ConfigError(f"{assigned(key, value)}: is a section, set a key such as {key}.{first}")
    if key not in SCHEMA.all_keys():
        raise ConfigError(unknown_key(key, value, [*SCHEMA.all_keys(), MODEL]))
    return key


def _near(key: str) -> str:
    return suggestion(key, [*SCHEMA.all_keys(), MODEL])
