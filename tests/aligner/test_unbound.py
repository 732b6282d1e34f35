"""The real forward step, taken off its class and put on a light object: no NeMo model is built.

The cheapest proof that the mixin runs the host's own forward step and replaces only the loss.
"""

import types
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf

from tests.aligner import cpu_host, grpo_session, tiny_actor
from tests.aligner import whole_group_loss as oracle
from tests.aligner.host_ranks import run_ranks

pytestmark = pytest.mark.pinned

VOCABULARY, PADDED, COUNT, WIDTH, START = 30, 32, 4, 10, 3
TAU, BETA_R, ALPHA = 0.24, 0.3, 0.6


class Toy(torch.nn.Module):
    """What the host calls: ids, positions and mask in, logits out."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = torch.nn.Embedding(PADDED, 16)
        self.output = torch.nn.Linear(16, PADDED)

    def forward(self, tokens: Any, positions: Any, mask: Any, labels: Any = None) -> torch.Tensor:
        return self.output(self.embedding(tokens))


def light_actor() -> Any:
    """The mixin over an object that has nothing of the host but its real forward step."""
    from nemo_apo.aligner.actor import ApoActorMixin

    kinds = ("grpo",) if cpu_host.uses_branch() else ("reinforce",)
    real = tiny_actor.real_actor_class(kinds[0])  # type: ignore[arg-type]

    class LightHost:
        get_actor_forward_output_and_loss_func = real.get_actor_forward_output_and_loss_func
        padded_vocab_size = PADDED

        def __init__(self, cfg: Any, trainer: Any) -> None:
            self.cfg = cfg
            self.tokenizer = types.SimpleNamespace(vocab_size=VOCABULARY)

    class Light(ApoActorMixin, LightHost):
        pass

    return Light(OmegaConf.create({"apo": grpo_session.apo_section({})}), None)


def _micro_batch(model: Toy) -> dict[str, torch.Tensor]:
    """Four answers of one group, with the columns of an APO step off the anchor."""
    from nemo_apo.aligner.columns import OLD_LOGPROBS
    from nemo_apo.plugin import columns

    draw = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, VOCABULARY, (COUNT, WIDTH), generator=draw)
    mask = torch.zeros(COUNT, WIDTH - 1)
    for row in range(COUNT):
        mask[row, START : START + 2 + row] = 1.0
    u, advantages = _u(model, tokens, mask), _advantages()
    return {
        "response_tokens": tokens,
        "attention_mask": torch.ones(COUNT),
        "position_ids": tokens,
        "mask": mask,
        OLD_LOGPROBS: _old(model, tokens),
        columns.COEFFICIENT: _coefficients(u.detach(), advantages),
        columns.ADVANTAGE: advantages,
        columns.TOKEN_WEIGHT: torch.ones(COUNT, dtype=torch.float64),
    }


def _advantages() -> torch.Tensor:
    return oracle.zscore(torch.tensor([[0.1, 0.9, 0.4, 0.2]], dtype=torch.float64))[0]


def _logprobs(model: Toy, tokens: torch.Tensor) -> torch.Tensor:
    log_p = torch.log_softmax(model(tokens, None, None)[:, :-1, :VOCABULARY], dim=-1)
    return log_p.gather(-1, tokens[:, 1:, None]).squeeze(-1)


def _old(model: Toy, tokens: torch.Tensor) -> torch.Tensor:
    drift = 0.1 * torch.randn(COUNT, WIDTH - 1, generator=torch.Generator().manual_seed(9))
    return _logprobs(model, tokens).detach() + drift


def _u(model: Toy, tokens: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    gap = (_logprobs(model, tokens) - _old(model, tokens)).double() * mask
    return gap.sum(dim=1) / TAU


def _coefficients(u: torch.Tensor, advantages: torch.Tensor) -> torch.Tensor:
    """dD/du / tau by autograd."""
    u = u.requires_grad_()
    oracle.alpha_loss(u[None], advantages[None], ALPHA, BETA_R).backward()
    return u.grad / TAU


def step_of_light_actor(rank: int) -> dict[str, Any]:
    """Gradient through the host's forward step and our loss, and through the whole loss."""
    from megatron.core import num_microbatches_calculator, parallel_state

    torch.distributed.init_process_group("gloo")
    parallel_state.initialize_model_parallel(1, 1)
    num_microbatches_calculator.init_num_microbatches_calculator(0, None, COUNT, 2, 1)
    torch.manual_seed(0)
    model, actor = Toy(), light_actor()
    micro_batch = _micro_batch(model)
    logits, loss_func = actor.get_actor_forward_output_and_loss_func()(iter([micro_batch]), model)
    loss, metrics = loss_func(logits)
    loss.backward()
    found = model.output.weight.grad.clone()
    model.zero_grad()
    u = _u(model, micro_batch["response_tokens"], micro_batch["mask"])
    oracle.alpha_loss(u[None], _advantages()[None], ALPHA, BETA_R).backward()
    return {"found": found, "wanted": model.output.weight.grad, "metrics": metrics}


def test_the_real_forward_step_with_our_loss() -> None:
    (result,) = run_ranks(1, step_of_light_actor)
    # Two micro-batches by the host's calculator, by whose number it would divide the loss.
    torch.testing.assert_close(result["found"], 2.0 * result["wanted"], rtol=1e-4, atol=1e-6)
    assert set(result["metrics"]) == {"loss"}
