"""What ``config.json`` says, and what is refused of it."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import transformers
import yaml

from nemo_apo import cli
from nemo_apo.compose import compose, conf_dir, to_yaml
from nemo_apo.config import ConfigError
from nemo_apo.config_rules import validate
from nemo_apo.hf_checkpoint.decoder import Decoder, UnfitCheckpoint, decoder_of, read_decoder

from .tiny_checkpoints import KINDS, VOCABULARY, write

MISSING = object()


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a checkpoint of every kind."""
    root = tmp_path_factory.mktemp("checkpoints")
    for kind in KINDS:
        write(root / kind, kind)
    return root


def content_of(root: Path, kind: str = "qwen3") -> dict[str, Any]:
    """The content of a config.json, as transformers wrote it."""
    content: dict[str, Any] = json.loads((root / kind / "config.json").read_text())
    return content


def refusal(*overrides: str, ranks: int = 1) -> str:
    """The message with which a configuration is refused."""
    with pytest.raises(ConfigError) as error:
        validate(compose(overrides), ranks)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("kind", KINDS)
def test_every_shape_is_read(kind: str, root: Path) -> None:
    values = KINDS[kind]
    assert read_decoder(root / kind) == Decoder(
        num_layers=4,
        hidden_size=32,
        ffn_hidden_size=48,
        num_attention_heads=4,
        num_query_groups=2,
        kv_channels=values.get("head_dim", 8),
        qk_layernorm=kind != "qwen2",
        add_qkv_bias=kind == "qwen2",
        rotary_base=500_000,
        layernorm_epsilon=1e-5,
        tied_embeddings=kind == "qwen3_tied",
        vocab_size=VOCABULARY,
    )


def test_the_rotary_base_and_the_type_as_transformers_4_writes_them(root: Path) -> None:
    content = content_of(root)
    del content["rope_parameters"], content["dtype"]
    content |= {"rope_theta": 12345.0, "rope_scaling": None, "torch_dtype": "bfloat16"}
    assert decoder_of(content).rotary_base == 12345
    assert transformers.Qwen3Config(**content).rope_parameters["rope_theta"] == 12345.0


@pytest.mark.parametrize(
    ("key", "value", "part"),
    [
        (
            "architectures",
            ["LlamaForCausalLM"],
            "must be one of Qwen3ForCausalLM, Qwen2ForCausalLM",
        ),
        ("architectures", ["Qwen3MoeForCausalLM"], "dense decoders alone are supported"),
        ("architectures", MISSING, "has architectures=null"),
        ("model_type", "qwen2", "must be qwen3 for Qwen3ForCausalLM"),
        ("num_experts", 8, "mixtures of experts"),
        ("quantization_config", {"quant_method": "fp8"}, "quantized weights"),
        ("hidden_act", "gelu", "must be SwiGLU"),
        ("attention_bias", True, "a bias in the attention's output"),
        ("attention_dropout", 0.1, "dropout is not supported"),
        ("use_sliding_window", True, "sliding windows are not supported"),
        ("layer_types", ["full_attention", "sliding_attention"], "only full_attention"),
        ("rope_scaling", {"type": "yarn", "factor": 4.0}, "scaled rotary embeddings"),
        ("rope_parameters", {"rope_type": "yarn", "rope_theta": 10000.0}, "scaled rotary"),
        ("rope_parameters", {"rope_theta": 1e4, "factor": 4.0}, "factor: not supported"),
        ("rope_parameters", {"rope_theta": 10000.5}, "must be a whole number"),
        ("rope_parameters", MISSING, "has rope_theta=null: must be a whole number"),
        ("rope_theta", 77, "contradicts rope_parameters.rope_theta=500000"),
        ("dtype", "float8_e4m3fn", "must be one of float32, bfloat16, float16"),
        ("torch_dtype", "int8", "must be one of float32, bfloat16, float16"),
        ("tie_word_embeddings", MISSING, "has tie_word_embeddings=null: must be true or false"),
        ("head_dim", MISSING, "has head_dim=null: must be a whole number"),
        ("vocab_size", MISSING, "has vocab_size=null: must be a whole number of at least 1"),
        ("num_hidden_layers", 4.0, "num_hidden_layers=4.0: must be a whole number"),
        ("num_key_value_heads", 0, "must be a whole number of at least 1"),
        ("rms_norm_eps", 0.0, "must lie in (0, 1)"),
        ("hidden_size", True, "has hidden_size=true: must be a whole number"),
    ],
)
def test_refused(key: str, value: Any, part: str, root: Path) -> None:
    content = content_of(root)
    if value is MISSING:
        del content[key]
    else:
        content[key] = value
    with pytest.raises(UnfitCheckpoint) as error:
        decoder_of(content)
    assert part in str(error.value)
    assert str(error.value).startswith("config.json has ")


@pytest.mark.parametrize(
    ("text", "part"),
    [(None, "config.json is missing"), ("{", "is not JSON"), ("[1]", "holds no JSON object")],
)
def test_a_file_that_cannot_be_read(text: str | None, part: str, tmp_path: Path) -> None:
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    assert part in refusal("model=hf", f"model.path={tmp_path}")


class TestComposed:
    def test_the_model_takes_over_every_shape(self, root: Path, tmp_path: Path) -> None:
        config = compose(["model=hf", f"model.path={root / 'qwen2'}", "model.params_dtype=float32"])
        shapes = dataclasses.asdict(read_decoder(root / "qwen2"))
        model = dataclasses.asdict(config.model)
        assert {key: model[key] for key in shapes} == shapes
        (tmp_path / "saved.yaml").write_text(to_yaml(config))
        assert compose([], config_file=tmp_path / "saved.yaml") == config

    def test_a_file_of_shapes_must_agree(self, root: Path, tmp_path: Path) -> None:
        message = refusal("model=qwen3_1.7b", f"model.path={root / 'qwen3'}")
        assert "the checkpoint model.path=" in message
        assert "model=hf takes over what it has" in message
        # The published shapes of the file itself do.
        file = yaml.safe_load((conf_dir() / "model" / "qwen3_1.7b.yaml").read_text())
        content = content_of(root, "qwen3_tied") | {
            "vocab_size": 151936,
            "hidden_size": 2048,
            "intermediate_size": 6144,
            "num_hidden_layers": 28,
            "num_attention_heads": 16,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "rms_norm_eps": 1e-6,
            "rope_parameters": {"rope_theta": 1e6, "rope_type": "default"},
        }
        (tmp_path / "config.json").write_text(json.dumps(content))
        config = compose(["model=qwen3_1.7b", f"model.path={tmp_path}"])
        assert dataclasses.asdict(config.model) == {**file, "path": str(tmp_path)}

    @pytest.mark.parametrize(
        ("override", "part"),
        [
            ("model.num_layers=3", "model.num_layers=3: the checkpoint"),
            ("model.qk_layernorm=false", "model.qk_layernorm=false: the checkpoint"),
            ("model.rotary_base=10000", "has rotary_base=500000"),
            ("model.tied_embeddings=1", "model.tied_embeddings=1"),
        ],
    )
    def test_an_override_may_not_contradict(self, override: str, part: str, root: Path) -> None:
        assert part in refusal("model=hf", f"model.path={root / 'qwen3'}", override)

    def test_without_a_checkpoint(self) -> None:
        assert "model.path=null: model=hf needs the folder" in refusal("model=hf")
        assert "there is no such folder" in refusal("model=hf", "model.path=Qwen/Qwen3-1.7B")

    def test_a_vocabulary_smaller_than_the_tasks(self, root: Path, tmp_path: Path) -> None:
        content = content_of(root) | {"vocab_size": 5}
        (tmp_path / "config.json").write_text(json.dumps(content))
        message = refusal("model=hf", f"model.path={tmp_path}")
        assert "model.vocab_size=5: must be at least the" in message

    def test_tensor_ranks_must_divide_the_query_groups(self, root: Path) -> None:
        tensor = "parallel.tensor_model_parallel_size=4"
        message = refusal("model=hf", f"model.path={root / 'qwen3'}", tensor, ranks=4)
        assert "must divide model.num_query_groups=2" in message


def test_a_mistake_ends_a_dry_run_and_a_run_with_2_before_anything_is_made(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(content_of(root)))
    overrides = ["model=hf", f"model.path={folder}", f"run.root={tmp_path / 'runs'}"]
    for dry in ("true", "false"):
        assert cli.main(["train", *overrides, f"run.dry_run={dry}"]) == 2
        assert "holds neither model.safetensors nor" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


def test_a_task_longer_than_the_model_was_made_for(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path / "checkpoint", "qwen3")
    content = content_of(root) | {"max_position_embeddings": 8}
    (tmp_path / "checkpoint" / "config.json").write_text(json.dumps(content))
    overrides = ["model=hf", f"model.path={tmp_path / 'checkpoint'}", "run.dry_run=true"]
    assert cli.main(["train", *overrides]) == 2
    assert "was made for 8 tokens (max_position_embeddings)" in capsys.readouterr().err
