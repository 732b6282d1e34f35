"""The harness itself: real actors build, and give the same numbers at every layout."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from uuid import uuid4

import pytest
import torch

from tests.aligner import cpu_host
from tests.aligner.host_ranks import run_ranks
from tests.aligner.shards import full_weights, gradients, load_shard, shard_of
from tests.aligner.tiny_actor import Built, Kind, build, tiny_config
from tests.forked_ranks import RankFailure

SEQUENCES, TOKENS = 4, 16

Tensors = Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class Pass:
    """What an actor computed on a rank, and the rank's place."""

    log_probs: torch.Tensor
    gradients: Tensors
    tp_rank: int
    pp_rank: int


def some_tokens() -> torch.Tensor:
    return torch.randint(0, 255, (SEQUENCES, TOKENS), generator=torch.Generator().manual_seed(3))


def a_batch(kind: Kind) -> dict[str, torch.Tensor]:
    """Equally long responses, so that the host's token means do not depend on the cut."""
    mask = torch.zeros(SEQUENCES, TOKENS - 1)
    mask[:, 5:12] = 1
    score = torch.tensor([1.0, -0.5, 0.25, 2.0])
    old = torch.full_like(mask, -5.0)
    done = torch.ones(SEQUENCES, dtype=torch.bool)
    common = {"response_tokens": some_tokens(), "mask": mask}
    if kind == "reinforce":
        return common | {"rewards_with_kl": score, "baseline": 0 * score, "is_end": done}
    if kind == "ppo":
        advantages = score[:, None].expand_as(mask).contiguous()
        return common | {"advantages": advantages, "prev_logprobs": old, "is_end": done}
    return common | {
        "advantages": score[:, None],
        "logprobs": old,
        "init_logprobs": old,
        "inference_logprobs": old,
        "importance_correction": torch.ones_like(mask),
        "valid_mask": done,
    }


def one_pass(kind: Kind, built: Built) -> Pass:
    from megatron.core import parallel_state as ranks

    actor = built.actor
    log_probs = actor.get_inference_log_probs(some_tokens())
    batch = {
        name: value.chunk(ranks.get_data_parallel_world_size())[ranks.get_data_parallel_rank()]
        for name, value in a_batch(kind).items()
    }
    actor.prepare_for_training()
    built.optimizer.zero_grad()
    actor.prepare_for_training_step()
    actor.get_loss_and_metrics(batch, forward_only=False)
    actor.finish_training_step()
    return Pass(
        log_probs,
        gradients(actor),
        ranks.get_tensor_model_parallel_rank(),
        ranks.get_pipeline_model_parallel_rank(),
    )


def whole(rank: int, kind: Kind) -> tuple[Tensors, Pass]:
    built = build(kind, tiny_config(kind), world_size=1)
    return full_weights(built.actor), one_pass(kind, built)


def in_parts(rank: int, kind: Kind, tp: int, pp: int, full: Tensors) -> Pass:
    from megatron.core import parallel_state as ranks

    built = build(kind, tiny_config(kind, tp, pp), world_size=2)
    tp_rank = ranks.get_tensor_model_parallel_rank()
    load_shard(built.actor, full, tp_rank, tp, ranks.get_pipeline_model_parallel_rank(), pp)
    return one_pass(kind, built)


def assert_same_in_parts(kind: Kind, tp: int, pp: int) -> None:
    [(full, expected)] = run_ranks(1, whole, kind)
    for part in run_ranks(2, in_parts, kind, tp, pp, full):
        torch.testing.assert_close(part.log_probs, expected.log_probs, rtol=0, atol=1e-5)
        shard = shard_of(expected.gradients, part.tp_rank, tp, part.pp_rank, pp, num_layers=2)
        torch.testing.assert_close(part.gradients, shard, rtol=1e-4, atol=1e-6)


@pytest.mark.released
@pytest.mark.parametrize("kind", ["reinforce", "ppo"])
def test_a_released_actor_runs_on_one_rank(kind: Kind) -> None:
    [(full, result)] = run_ranks(1, whole, kind)
    assert result.log_probs.shape == (SEQUENCES, TOKENS - 1)
    assert torch.isfinite(result.log_probs).all()
    assert result.log_probs.std() > 0.1
    assert result.gradients.keys() == full.keys()
    assert all(gradient.abs().max() > 1e-4 for gradient in result.gradients.values())


@pytest.mark.released
@pytest.mark.parametrize("kind", ["reinforce", "ppo"])
@pytest.mark.parametrize(("tp", "pp"), [(2, 1), (1, 2), (1, 1)])
def test_a_released_actor_gives_the_same_numbers_in_parts(kind: Kind, tp: int, pp: int) -> None:
    assert_same_in_parts(kind, tp, pp)


@pytest.mark.branch
@pytest.mark.parametrize(("tp", "pp"), [(2, 1), (1, 2), (1, 1)])
def test_the_branch_actor_gives_the_same_numbers_in_parts(tp: int, pp: int) -> None:
    assert_same_in_parts("grpo", tp, pp)


@pytest.mark.branch
def test_the_branch_actor_leaves_shared_memory_alone() -> None:
    bystander = Path("/dev/shm") / f"nemo_apo_{uuid4().hex}"
    bystander.write_text("someone else's")
    try:
        run_ranks(1, whole, "grpo")
        assert bystander.read_text() == "someone else's"
    finally:
        bystander.unlink(missing_ok=True)


def test_an_unprotected_actor_module_is_refused() -> None:
    module = ModuleType("an_actor")
    module.remove_writable_files = lambda directory: None  # type: ignore[attr-defined]
    with pytest.raises(AssertionError, match="remove_writable_files would touch /dev/shm"):
        cpu_host.assert_shared_memory_protected(module)
    cpu_host.protect_shared_memory(module)
    cpu_host.assert_shared_memory_protected(module)


@pytest.mark.pinned
def test_a_failing_rank_shows_its_traceback() -> None:
    def fail_on_one(rank: int) -> int:
        if rank == 1:
            raise KeyError("the cause")
        return rank

    with pytest.raises(RankFailure, match=r"(?s)rank 1 of 2 failed.*fail_on_one.*the cause"):
        run_ranks(2, fail_on_one)


@pytest.mark.pinned
def test_ranks_that_do_not_end_are_killed() -> None:
    def wait_for_ever(rank: int) -> None:
        torch.multiprocessing.Event().wait()

    with pytest.raises(RankFailure, match="killed after"):
        run_ranks(2, wait_for_ever, timeout_s=0.5)


def test_a_shard_holds_whole_rows_halves_and_layers() -> None:
    layer = {
        "mlp.linear_fc1.weight": torch.tensor([[1], [2], [3], [4]]),
        "mlp.linear_fc2.weight": torch.tensor([[5, 6]]),
        "input_layernorm.weight": torch.tensor([7]),
    }
    full = {
        "embedding.word_embeddings.weight": torch.tensor([[8], [9]]),
        **{f"decoder.layers.0.{name}": tensor for name, tensor in layer.items()},
        **{f"decoder.layers.1.{name}": tensor + 10 for name, tensor in layer.items()},
        "decoder.final_layernorm.weight": torch.tensor([20]),
        "output_layer.weight": torch.tensor([[21], [22]]),
    }
    shard = shard_of(full, tp_rank=1, tp=2, pp_rank=1, pp=2, num_layers=2)
    assert {name: tensor.tolist() for name, tensor in shard.items()} == {
        # The second row of the gate, then the second row of the up projection.
        "decoder.layers.0.mlp.linear_fc1.weight": [[12], [14]],
        "decoder.layers.0.mlp.linear_fc2.weight": [[16]],
        "decoder.layers.0.input_layernorm.weight": [17],
        "decoder.final_layernorm.weight": [20],
        "output_layer.weight": [[22]],
    }
