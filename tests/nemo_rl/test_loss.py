"""The loss by itself: what a worker does with it before and beside calling it."""

import pickle
import subprocess
import sys

import pytest
import torch

from nemo_apo.core.objectives import OBJECTIVES, Columns, Regularizers
from nemo_apo.nemo_rl.loss import TOKEN_SUMS, ApoLoss
from nemo_apo.plugin.columns import attach

from .small_host import Batch, batch_with

# One sequence of four tokens, of which the last two are its completion, and one that is masked.
LOGPROBS_BT = [[-1.0, -2.0, -0.5], [float("nan"), -1.0, -1.0]]


def batch() -> Batch:
    data = batch_with(
        input_ids=torch.ones(2, 4, dtype=torch.long),
        token_mask=torch.tensor([[0.0, 0.0, 1.0, 1.0], [0.0, 1.0, 1.0, 1.0]]),
        sample_mask=torch.tensor([1.0, 0.0]),
        prev_logprobs=torch.tensor([[0.0, -1.0, -1.5, -0.5], [0.0, -1.0, -1.0, -1.0]]),
        generation_logprobs=torch.tensor([[0.0, -9.0, -1.0, -0.5], [0.0, 9.0, 9.0, 9.0]]),
        reference_policy_logprobs=torch.tensor([[0.0, -1.0, -2.5, -0.5], [0.0, 1.0, 1.0, 1.0]]),
    )
    weights = torch.tensor([0.5, 0.25], dtype=torch.float64)
    made = Columns(torch.tensor([3.0, 7.0]).double(), weights.clone(), weights)
    attach(data, made, weights.device)
    return data


def called(loss: ApoLoss) -> tuple[torch.Tensor, dict[str, float], torch.Tensor]:
    """Loss, metrics, and the gradient with respect to the log-probs."""
    logprobs = torch.tensor(LOGPROBS_BT, requires_grad=True)
    value, metrics = loss(batch(), torch.tensor(1.0), torch.tensor(2.0), logprobs)
    value.backward()
    assert logprobs.grad is not None
    return value, metrics, logprobs.grad


def test_an_anchored_objective_is_the_weighted_sum_of_sequence_logprobs() -> None:
    value, metrics, gradient = called(ApoLoss(OBJECTIVES["apo"], Regularizers()))
    assert value.item() == 3.0 * (-2.0 - 0.5), "the masked sequence counts for nothing, NaN or not"
    assert gradient.tolist() == [[0.0, 3.0, 3.0], [0.0, 0.0, 0.0]]
    assert metrics["loss"] == value.item()
    assert metrics["num_valid_samples"] == 1.0
    assert [metrics[name] for name in TOKEN_SUMS] == [0.0, 2.0]


def test_a_token_objective_reads_old_logprobs_and_advantages() -> None:
    value, metrics, gradient = called(ApoLoss(OBJECTIVES["grpo"], Regularizers()))
    ratio = torch.tensor([-0.5, 0.0]).exp()
    assert value.item() == pytest.approx(float(-0.5 * (0.5 * ratio).sum()))
    assert metrics["probs_ratio"] == pytest.approx(float(ratio.mean()))
    assert gradient[0].tolist() == pytest.approx([0.0, *(-0.25 * ratio).tolist()])


def test_a_kl_penalty_reads_the_reference() -> None:
    plain, _, _ = called(ApoLoss(OBJECTIVES["apo"], Regularizers()))
    value, _, _ = called(ApoLoss(OBJECTIVES["apo"], Regularizers(kl_coef=2.0, kl_estimator="k2")))
    # log pi - log pi_ref is 0.5 on one token and 0 on the other; tokens weigh 0.5.
    assert (value - plain).item() == pytest.approx(2.0 * 0.5 * 0.5**2 / 2)


def test_the_hosts_own_figures_compare_sampler_and_trainer_on_completion_tokens() -> None:
    _, metrics, _ = called(ApoLoss(OBJECTIVES["apo"], Regularizers()))
    gap = torch.tensor([-0.5, 0.0])  # trainer minus sampler
    assert metrics["token_mult_prob_error"] == pytest.approx(float(gap.abs().exp().mean()))
    assert metrics["gen_kl_error"] == pytest.approx(float((gap.exp() - 1.0 - gap).mean()))


@pytest.mark.parametrize("name", OBJECTIVES)
def test_it_is_the_same_on_the_other_side_of_a_pickle(name: str) -> None:
    loss = ApoLoss(OBJECTIVES[name], Regularizers(kl_coef=0.1), fused_linear_logprobs=True)
    copy = pickle.loads(pickle.dumps(loss))
    assert vars(copy) == vars(loss)
    assert copy.use_fused_linear_logprobs
    assert called(copy)[0].item() == called(loss)[0].item()


def test_a_worker_needs_nothing_but_torch_to_unpickle_it() -> None:
    """Its environment is the host's: nothing that only ours has may be imported."""
    pickled = pickle.dumps(ApoLoss(OBJECTIVES["apo"], Regularizers()))
    script = (
        "import pickle, sys\n"
        f"pickle.loads({pickled!r})\n"
        "heavy = {'omegaconf', 'hydra', 'megatron', 'ray', 'nemo_rl', 'matplotlib', 'rich'}\n"
        "print(sorted({name.split('.')[0] for name in sys.modules} & heavy))\n"
    )
    told = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert told.stdout.strip() == "[]"
