"""Runs that start from a checkpoint, and what is exported of them, against transformers."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from nemo_apo import cli, record
from nemo_apo.compose.hf_model import with_checkpoint_shapes
from nemo_apo.config import Config, ConfigError, EvaluationConfig, ModelConfig, ParallelConfig
from nemo_apo.parallel import layout as parallel_layout
from nemo_apo.tasks import Prompt
from nemo_apo.trainer import checkpoint
from nemo_apo.trainer.checkpoint_search import newest_verified
from nemo_apo.trainer.engines.interface import Sampling
from nemo_apo.trainer.hf_export import export
from nemo_apo.trainer.loop import build_policy, run
from nemo_apo.trainer.sampler import generate
from tests.hf_checkpoint.tiny_checkpoints import (
    KINDS,
    VOCABULARY,
    logits_of,
    make_model,
    tensors_in,
    write,
)
from tests.parallel.ranks import run_ranks

from .tiny_runs import tiny_config

pytestmark = pytest.mark.slow(reason="trains runs on up to four ranks and exports them")

# Kind of checkpoint, tensor- and pipeline-parallel size.
CASES = [("qwen3", 1, 1), ("qwen2", 2, 1), ("qwen3_tied", 2, 2)]
STEPS = 2


def configured(root: Path, kind: str, tensor: int = 1, pipeline: int = 1, **run: Any) -> Config:
    """A run of two RL steps, one optimizer step each, from the checkpoint ``root/kind``."""
    values = {"path": str(root / kind), "num_layers": None, "make_vocab_size_divisible_by": 8}
    config = tiny_config(
        model=ModelConfig(**with_checkpoint_shapes(values)),
        parallel=ParallelConfig(
            tensor_model_parallel_size=tensor,
            pipeline_model_parallel_size=pipeline,
            backend="gloo",
        ),
        evaluation=EvaluationConfig(every=100, prompts=4, pass_prompts=2, pass_k=2),
    )
    settings = {"root": str(root / "runs"), "steps": STEPS, "save_every": 1, **run}
    return replace(
        config,
        run=replace(config.run, name=f"{kind}_{tensor}_{pipeline}", **settings),
        update=replace(config.update, mini_batches=1),
    )


def ranks_of(config: Config) -> int:
    """Ranks of one replica of the model."""
    sizes = config.parallel
    return sizes.tensor_model_parallel_size * sizes.pipeline_model_parallel_size


def folder_of(config: Config) -> Path:
    """The run's folder."""
    return Path(config.run.root) / config.run.name


def exported(source: Path, target: Path, **options: Any) -> Path:
    """An export by a process of its own."""
    run_ranks(1, lambda: export(source, target, **options))
    return target


def refusal(source: Path, target: Path, **options: Any) -> str:
    """The message with which an export is refused."""

    def refused() -> str:
        with pytest.raises(ConfigError) as error:
            export(source, target, **options)
        return str(error.value)

    return run_ranks(1, refused)[0]


def weights_of(config: Config) -> dict[str, Tensor]:
    """The weights of the newest checkpoint, put together by hand from those of each rank."""

    def read() -> dict[str, Tensor]:
        layout = parallel_layout.initialize(config.parallel, 0)
        policy = build_policy(config, layout, weights_follow=True)
        found = newest_verified(folder_of(config) / record.CHECKPOINT_DIR)
        assert found is not None
        checkpoint.load_weights(found.newest.folder, policy)
        return {name: value.clone() for name, value in policy.refit_sampler().named_parameters()}

    return run_ranks(ranks_of(config), read)[0]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a checkpoint of every kind and a finished run of every case."""
    root = tmp_path_factory.mktemp("root")
    for kind in KINDS:
        write(root / kind, kind)
        (root / kind / "tokenizer.json").write_text('{"made": "up"}')
    for case in CASES:
        config = configured(root, *case)
        run_ranks(ranks_of(config), run, config)
    return root


@pytest.mark.parametrize("case", CASES, ids=lambda case: "_".join(map(str, case)))
def test_trained_weights_come_back_in_transformers(
    case: tuple[str, int, int], root: Path, tmp_path: Path
) -> None:
    config = configured(root, *case)
    target = exported(folder_of(config), tmp_path / "out", max_shard_bytes=20_000)
    trained, start, found = weights_of(config), tensors_in(root / case[0]), tensors_in(target)
    assert found.keys() == start.keys()
    assert all(found[name].shape == start[name].shape for name in start)
    # Every matrix has moved, and some of those that are the same in both are here to be compared.
    assert all(not torch.equal(found[n], start[n]) for n in start if "proj.weight" in n)
    for layer in range(4):
        for own, name in (("mlp.linear_fc2", "mlp.down_proj"),
                          ("self_attention.linear_proj", "self_attn.o_proj")):  # fmt: skip
            weight = found[f"model.layers.{layer}.{name}.weight"]
            assert torch.equal(weight, trained[f"decoder.layers.{layer}.{own}.weight"])
    embedding = trained["embedding.word_embeddings.weight"]
    assert torch.equal(found["model.embed_tokens.weight"], embedding[:VOCABULARY])
    assert len(list(target.glob("*.safetensors"))) > 2


@pytest.mark.parametrize("kind", KINDS)
def test_greedy_answers_are_those_of_the_exported_model(
    kind: str, root: Path, tmp_path: Path
) -> None:
    config = configured(root, *next(case for case in CASES if case[0] == kind))
    target = exported(folder_of(config), tmp_path / "out")
    prompts = [Prompt("", (5, 9, 2, 40)), Prompt("", (60, 1, 33, 7))]

    def answers() -> tuple[Tensor, Tensor]:
        layout = parallel_layout.initialize(config.parallel, 0)
        policy = build_policy(config, layout, weights_follow=True)
        found = newest_verified(folder_of(config) / record.CHECKPOINT_DIR)
        assert found is not None
        checkpoint.load_weights(found.newest.folder, policy)
        sampling = replace(
            Sampling.of(config.task, VOCABULARY, temperature=1.0, micro_batch_size=2),
            end_id=-1,
            max_response_length=12,
        )
        done = generate(policy.refit_sampler(), prompts, None, sampling)
        return done.tokens_NR, done.logprob_sums_N

    tokens_NR, sums_N = run_ranks(ranks_of(config), answers)[0]
    model = transformers.AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32).eval()
    start = torch.tensor([prompt.tokens for prompt in prompts])
    whole = model.generate(
        start, attention_mask=torch.ones_like(start), max_new_tokens=12, do_sample=False,
        eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    assert torch.equal(whole[:, 4:], tokens_NR)
    log_p_NTV = logits_of(target, whole).double().log_softmax(dim=-1)[:, 3:-1]
    expected_N = log_p_NTV.gather(2, tokens_NR[..., None]).sum(dim=(1, 2))
    torch.testing.assert_close(sums_N, expected_N, rtol=1e-5, atol=1e-5)


def test_the_origins_files_come_along_and_its_configuration_but_for_the_type(
    root: Path, tmp_path: Path
) -> None:
    config = configured(root, *CASES[0])
    target = exported(folder_of(config), tmp_path / "out", dtype="bfloat16")
    was = json.loads((root / "qwen3" / "config.json").read_text())
    assert json.loads((target / "config.json").read_text()) == {**was, "dtype": "bfloat16"}
    assert {path.name for path in target.iterdir()} == {
        "config.json", "generation_config.json", "model.safetensors", "tokenizer.json",
    }  # fmt: skip
    assert (target / "tokenizer.json").read_text() == '{"made": "up"}'
    assert {value.dtype for value in tensors_in(target).values()} == {torch.bfloat16}
    model = transformers.AutoModelForCausalLM.from_pretrained(target)
    assert model.dtype == torch.bfloat16
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_one_of_several_checkpoints_is_exported_by_its_folder(root: Path, tmp_path: Path) -> None:
    folder = folder_of(configured(root, *CASES[0])) / record.CHECKPOINT_DIR
    first = tensors_in(exported(folder / "step_000001", tmp_path / "first"))
    last = tensors_in(exported(folder / "step_000002", tmp_path / "last"))
    newest = tensors_in(exported(folder.parent, tmp_path / "newest"))
    assert all(torch.equal(last[name], newest[name]) for name in newest)
    assert not all(torch.equal(last[name], first[name]) for name in first)


@pytest.mark.parametrize("tied", [False, True])
def test_a_model_without_origin_gets_a_configuration_of_its_own(tied: bool, tmp_path: Path) -> None:
    config = tiny_config()
    config = replace(
        config,
        run=replace(config.run, root=str(tmp_path / "runs"), steps=1, save_every=1),
        model=replace(config.model, tied_embeddings=tied),
        evaluation=EvaluationConfig(every=100, prompts=4, pass_prompts=2, pass_k=2),
    )
    run_ranks(1, run, config)
    target = exported(folder_of(config), tmp_path / "out")
    tokens_NT = torch.tensor([[1, 5, 3, 2, 2, 7]])

    def read() -> Tensor:
        layout = parallel_layout.initialize(config.parallel, 0)
        policy = build_policy(config, layout)
        checkpoint.load_weights(folder_of(config) / "checkpoints" / "step_000001", policy)
        positions, mask = torch.arange(6)[None], torch.ones(6, 6, dtype=torch.bool).triu(1)
        hidden = policy.stage(tokens_NT, positions, mask[None, None])
        return (hidden @ policy.stage.output_weight.t()).detach()

    vocabulary = config.task.vocab_size
    logits = run_ranks(1, read)[0][..., :vocabulary]
    torch.testing.assert_close(logits_of(target, tokens_NT), logits, rtol=1e-5, atol=1e-5)
    assert type(transformers.AutoConfig.from_pretrained(target)).__name__ == "Qwen3Config"


def test_a_resumed_run_needs_no_weights_of_the_origin(root: Path, tmp_path: Path) -> None:
    write(tmp_path / "qwen3", "qwen3")
    config = configured(tmp_path, "qwen3", stop_after=1)
    run_ranks(1, run, config)
    (tmp_path / "qwen3" / "model.safetensors").unlink()
    moved = tmp_path / "elsewhere"
    (tmp_path / "qwen3").rename(moved)
    resumed = replace(
        config,
        run=replace(config.run, stop_after=None, if_exists="resume"),
        model=replace(config.model, path=str(moved)),
    )
    run_ranks(1, run, resumed)
    uninterrupted = tensors_in(exported(folder_of(configured(root, *CASES[0])), tmp_path / "one"))
    found = tensors_in(exported(folder_of(config), tmp_path / "other", origin=moved))
    assert all(torch.equal(found[name], uninterrupted[name]) for name in uninterrupted)


class TestRefused:
    def test_a_folder_that_exists(self, root: Path, tmp_path: Path) -> None:
        source = folder_of(configured(root, *CASES[0]))
        assert "exists already" in refusal(source, tmp_path)
        assert list(tmp_path.iterdir()) == []

    def test_weights_alone(self, tmp_path: Path) -> None:
        config = tiny_config()

        def save() -> None:
            layout = parallel_layout.initialize(config.parallel, 0)
            checkpoint.save_weights(tmp_path / "weights", build_policy(config, layout))

        run_ranks(1, save)
        assert "holds weights alone" in refusal(tmp_path / "weights", tmp_path / "out")

    def test_no_run(self, tmp_path: Path) -> None:
        message = refusal(tmp_path, tmp_path / "out")
        assert "neither a checkpoint nor a run with checkpoints" in message

    def test_an_origin_of_another_shape(self, root: Path, tmp_path: Path) -> None:
        source = folder_of(configured(root, *CASES[0]))
        message = refusal(source, tmp_path / "out", origin=root / "qwen2")
        assert "of another model than was trained" in message
        assert "kv_channels=8, not 16" in message
        assert list(tmp_path.iterdir()) == []

    def test_an_origin_that_has_gone(self, root: Path, tmp_path: Path) -> None:
        (tmp_path / "qwen3").mkdir()
        for path in (root / "qwen3").iterdir():
            (tmp_path / "qwen3" / path.name).write_bytes(path.read_bytes())
        config = configured(tmp_path, "qwen3", stop_after=1)
        run_ranks(1, run, config)
        (tmp_path / "qwen3").rename(tmp_path / "gone")
        message = refusal(folder_of(config), tmp_path / "out")
        assert f"{tmp_path / 'qwen3'}, where training took" in message
        assert "--origin" in message

    def test_a_damaged_checkpoint(self, root: Path, tmp_path: Path) -> None:
        source = folder_of(configured(root, *CASES[0])) / "checkpoints" / "step_000001"
        copy = tmp_path / "step_000001"
        copy.mkdir()
        for path in source.iterdir():
            (copy / path.name).write_bytes(path.read_bytes())
        data = copy / "trainer_state.json"
        data.write_text(data.read_text().replace('"step": 1', '"step": 7'))
        assert "is damaged: the content of trainer_state.json" in refusal(copy, tmp_path / "out")

    def test_a_number_too_large_for_the_type(self, tmp_path: Path) -> None:
        model = make_model("qwen3")
        with torch.no_grad():
            model.model.norm.weight[3] = 1e6
        model.save_pretrained(tmp_path / "qwen3")
        config = configured(tmp_path, "qwen3", stop_after=1)
        run_ranks(1, run, config)
        message = refusal(folder_of(config), tmp_path / "out", dtype="float16")
        assert "model.norm.weight holds numbers that are not finite in float16" in message
        assert not (tmp_path / "out").exists()
        assert not list(tmp_path.glob(".partial_*"))


def test_the_command(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, target = folder_of(configured(root, *CASES[0])), tmp_path / "out"

    def command() -> tuple[int, str]:
        status = cli.main(["export", str(source), str(target), "--dtype", "float16"])
        return status, capsys.readouterr().out

    status, out = run_ranks(1, command)[0]
    assert status == 0
    assert "step_000002, RL step 2 -> " in out
    assert "model.safetensors, config.json, generation_config.json, tokenizer.json" in out
    assert tensors_in(target)["model.norm.weight"].dtype == torch.float16
