"""The policy mixin over a host that keeps the contract: gradients, refresh, state, metrics."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from nemo_apo.config import ConfigError
from nemo_apo.core.objectives import OBJECTIVES, Regularizers
from nemo_apo.nemo_rl.loss import ApoLoss
from nemo_apo.nemo_rl.metrics import joined
from nemo_apo.plugin.bookkeeping import TrainingStopped
from nemo_apo.plugin.rollout import RolloutError
from tests.aligner import whole_group_loss as oracle

from .coupled import ALPHA, COUPLED
from .small_host import GROUP, LR, Batch, Cut, Session, logprobs_of, rollout

FIXED = {"schedule": {"name": "fixed", "alpha": ALPHA}}
CUTS = {
    "one piece": Cut(),
    "single sequences": Cut(micro_batch_size=1),
    "shuffled, two ranks": Cut(lambda count: [i * 3 % count for i in range(count)], 2, 1),
    "groups across ranks": Cut(lambda count: [*range(0, count, 2), *range(1, count, 2)], 2, 2),
}


def settings(name: str, **sections: Any) -> dict[str, Any]:
    return {"objective": {"name": name}, **FIXED, **sections}


def loss_of(session: Session) -> ApoLoss:
    return ApoLoss(session.run.settings.objective, session.run.settings.regularizers)


def coupled_gradients(
    data: Batch, rewards: Tensor, size: int, loss: Callable[..., Tensor]
) -> list[Tensor]:
    """The gradient of each optimizer step by autograd through whole groups in one piece."""
    table = torch.zeros(7, 7, dtype=torch.float64)
    old = logprobs_of(table, data["input_ids"])[:, 1:]
    gradients = []
    for first in range(0, data.size, size):
        rows = slice(first, first + size)
        leaf = table.clone().requires_grad_(True)
        new = logprobs_of(leaf, data["input_ids"][rows])[:, 1:]
        mask = data["token_mask"][rows, 1:].double()
        advantages = oracle.zscore(rewards[rows].double().view(-1, GROUP))
        loss(new, old[rows], mask, advantages).backward()
        gradients.append(leaf.grad)
        table = table - LR * leaf.grad
    return gradients


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("objective", COUPLED)
def test_gradients_are_those_of_the_coupled_loss(objective: str, cut: str) -> None:
    """Two optimizer steps per rollout, so that the second one stands on refreshed log-probs."""
    data, rewards = rollout(seed=1)
    session = Session(settings(objective), cut=CUTS[cut])
    session.train(data, rewards, loss_of(session))
    wanted = coupled_gradients(data, rewards, 8, COUPLED[objective])
    assert len(session.policy.gradients) == len(wanted) == 2
    for found, exact in zip(session.policy.gradients, wanted, strict=True):
        assert float((found - exact).abs().max()) < 2e-8 * float(exact.abs().max())


def test_the_refresh_reads_in_inference_mode_and_only_where_it_is_needed() -> None:
    data, rewards = rollout(seed=2)
    for objective, reads in {"apo": ["train", "inference"], "grpo": ["train"]}.items():
        session = Session(settings(objective))
        session.train(data, rewards, loss_of(session))
        assert session.policy.read_modes == reads, "the first read is the host's own"


def test_the_refresh_replays_the_experts_that_the_sampler_chose() -> None:
    data, rewards = rollout(seed=2)
    session = Session(settings("apo"))
    given = session.given(data, rewards)
    given["routed_experts"] = torch.arange(data.size)
    seen: list[Batch] = []
    read = session.policy.get_logprobs
    session.policy.get_logprobs = lambda batch: seen.append(batch) or read(batch)
    session.policy.train(given, loss_of(session))
    assert [batch["routed_experts"].tolist() for batch in seen] == [[*range(8, 16)]]


def test_another_loss_is_trained_as_ever() -> None:
    data, rewards = rollout(seed=3)
    session = Session(FIXED)
    given = session.given(data, rewards)

    def host_loss(part: Batch, seqs: Tensor, toks: Tensor, logprobs: Tensor) -> tuple:
        return -logprobs.sum(), {"loss": 1.0, "num_valid_samples": 1.0}

    result = session.policy.train(given, host_loss)
    assert len(session.policy.gradients) == 2
    assert not [name for name in result["all_mb_metrics"] if name.startswith("apo/")]
    assert session.run.state.rl_steps == 0


def test_an_evaluation_is_the_hosts_own() -> None:
    data, rewards = rollout(seed=3)
    session = Session(FIXED)
    given = session.given(data, rewards)
    assert session.policy.train(given, loss_of(session), eval_mode=True) == {"evaluated": 16}


def test_figures_of_several_calls_are_joined_as_the_host_reads_them() -> None:
    calls = [
        {"all_mb_metrics": {"loss": [1.0, 2.0], "lr": [0.5], "probs_ratio_max": [3.0]}},
        {"all_mb_metrics": {"loss": [4.0], "lr": [0.25], "probs_ratio_max": [7.0]}},
    ]
    metrics = joined(calls, {}, loss=-3.0, grad_norm=1.0)["all_mb_metrics"]
    # The host overwrites the loss with this list, so it must be ours, too.
    assert metrics == {"loss": [-3.0], "lr": [0.5, 0.25], "probs_ratio_max": [3.0, 7.0]}


def test_metrics_have_the_hosts_names_and_are_means_over_the_optimizer_steps() -> None:
    data, rewards = rollout(seed=4)
    session = Session(settings("apo"), cut=Cut(micro_batch_size=2))
    result = session.train(data, rewards, loss_of(session))
    metrics = result["all_mb_metrics"]
    summed = {name: sum(values) for name, values in metrics.items()}
    assert summed["apo/alpha"] == ALPHA
    assert summed["apo/reward_mean"] == pytest.approx(float(rewards.double().mean()))
    # Minus the mean log-prob of what was sampled; under a table of zeros every token has the same.
    assert summed["apo/token_entropy"] == pytest.approx(torch.log(torch.tensor(7.0)).item())
    assert summed["apo/sampler_mismatch"] == pytest.approx(0.01, rel=1e-4)
    # The sampler's probabilities are a factor exp(.01) above the trainer's.
    assert summed["token_mult_prob_error"] == pytest.approx(1.01005, rel=1e-4)
    assert summed["gen_kl_error"] == pytest.approx(4.983e-5, rel=1e-3)
    assert summed["num_valid_samples"] == 8.0, "of an optimizer step"
    assert metrics["lr"] == [LR] * 8
    assert result["total_flops"] == 10.0
    assert result["grad_norm"].numpy().shape == (1,)
    norms = [float(gradient.norm()) for gradient in session.policy.gradients]
    assert summed["apo/grad_norm"] == pytest.approx(sum(norms) / 2)
    assert not [name for name in metrics if name in ("apo_clipped_tokens", "apo_tokens")]


def test_alpha_follows_the_schedule_from_step_to_step_and_through_a_checkpoint(
    tmp_path: Path,
) -> None:
    """A run that is resumed after its second RL step goes on as if nothing had happened."""
    apo = {"schedule": {"name": "ess", "rho": 0.5}}

    def alphas(session: Session, seeds: range) -> list[float]:
        seen = []
        for seed in seeds:
            data, rewards = rollout(seed)
            result = session.train(data, rewards, loss_of(session))
            seen += result["all_mb_metrics"]["apo/alpha"]
        return seen

    whole = Session(apo)
    wanted = alphas(whole, range(4))
    assert len(set(wanted)) > 2, "alpha must move, else nothing is shown"

    first = Session(apo)
    before = alphas(first, range(2))
    weights = tmp_path / "step_2" / "policy" / "weights"
    first.policy.save_checkpoint(str(weights))
    second = Session(apo, weights_path=str(weights))
    assert before + alphas(second, range(2, 4)) == wanted
    assert torch.equal(second.policy.table, whole.policy.table)
    assert second.run.state == whole.run.state


def test_a_checkpoint_without_our_state_is_refused_unless_told_otherwise(tmp_path: Path) -> None:
    weights = tmp_path / "step_1" / "policy" / "weights"
    weights.parent.mkdir(parents=True)
    torch.save(torch.zeros(7, 7, dtype=torch.float64), weights)
    with pytest.raises(ConfigError, match=r"nemo_apo\.json is missing.*apo\.resume\.without_state"):
        Session(FIXED, weights_path=str(weights))
    fresh = Session({**FIXED, "resume": {"without_state": "fresh"}}, weights_path=str(weights))
    assert fresh.run.state.rl_steps == 0


@pytest.mark.parametrize("content", ["{", "5", '{"rl_steps": 1}'])
def test_a_damaged_state_is_refused(tmp_path: Path, content: str) -> None:
    session = Session(FIXED)
    weights = tmp_path / "policy" / "weights"
    session.policy.save_checkpoint(str(weights))
    (weights.parent / "nemo_apo.json").write_text(content)
    with pytest.raises(ConfigError):
        Session(FIXED, weights_path=str(weights))


def test_a_checkpoint_of_another_schedule_is_refused(tmp_path: Path) -> None:
    weights = tmp_path / "policy" / "weights"
    Session(FIXED).policy.save_checkpoint(str(weights))
    assert json.loads((weights.parent / "nemo_apo.json").read_text())["schedule_name"] == "fixed"
    with pytest.raises(ConfigError, match=r"apo\.schedule\.name=ess.*schedule=fixed"):
        Session({"schedule": {"name": "ess"}}, weights_path=str(weights))


def test_a_masked_sequence_takes_its_group_along() -> None:
    """The others' gradient is that of a rollout that never had the group."""
    data, rewards = rollout(seed=5)
    data["sample_mask"][5] = 0.0
    session = Session(settings("apo"), batch_size=16)
    result = session.train(data, rewards, loss_of(session))
    kept = torch.tensor([*range(4), *range(8, 16)])
    alone = Session(settings("apo"), batch_size=12)
    alone.train(
        Batch({name: column[kept] for name, column in data.items()}), rewards[kept], loss_of(alone)
    )
    assert torch.allclose(session.policy.gradients[0], alone.policy.gradients[0], atol=1e-15)
    assert sum(result["all_mb_metrics"]["apo/groups_dropped"]) == 1
    assert sum(result["all_mb_metrics"]["num_valid_samples"]) == 12


def test_a_group_dropped_from_a_later_optimizer_step_shifts_nothing() -> None:
    data, rewards = rollout(seed=5)
    data["sample_mask"][9] = 0.0
    session = Session(settings("apo"))
    session.train(data, rewards, loss_of(session))
    both = coupled_gradients(data, rewards, 8, COUPLED["apo"])
    kept = torch.tensor([*range(8), *range(12, 16)])
    alone = Batch({name: column[kept] for name, column in data.items()})
    first, second = session.policy.gradients
    assert torch.allclose(first, both[0], rtol=1e-7, atol=1e-12)
    table = -LR * first
    leaf = table.clone().requires_grad_(True)
    mask = alone["token_mask"][8:, 1:].double()
    old = logprobs_of(torch.zeros(7, 7, dtype=torch.float64), alone["input_ids"][8:])[:, 1:]
    new = logprobs_of(leaf, alone["input_ids"][8:])[:, 1:]
    COUPLED["apo"](new, old, mask, oracle.zscore(rewards[12:].double().view(-1, GROUP))).backward()
    assert torch.allclose(second, leaf.grad, rtol=1e-7, atol=1e-12)


def test_a_rollout_with_nothing_to_train_on_leaves_weights_and_schedule_alone() -> None:
    data, rewards = rollout(seed=6)
    data["sample_mask"][::GROUP] = 0.0
    session = Session()
    result = session.train(data, rewards, loss_of(session))
    assert session.policy.gradients == []
    assert session.run.state.rl_steps == 1
    assert session.run.state.schedule.alpha is None
    assert {"loss", "gen_kl_error", "token_mult_prob_error", "global_valid_toks"} <= result[
        "all_mb_metrics"
    ].keys()
    assert result["loss"].isnan().all()


def test_a_logprob_that_is_not_finite_skips_its_optimizer_step_alone() -> None:
    data, rewards = rollout(seed=7)
    session = Session(settings("apo"))
    given = session.given(data, rewards)
    row = 9
    given["prev_logprobs"][row, int(data["token_mask"][row].argmax())] = float("nan")
    result = session.policy.train(given, loss_of(session))
    assert len(session.policy.gradients) == 1
    assert torch.isfinite(session.policy.table).all()
    assert result["all_mb_metrics"]["apo/skipped_logprobs"] == [1.0]
    assert session.run.state.skipped_in_a_row == 1


def test_refreshed_logprobs_that_are_not_finite_skip_their_optimizer_step() -> None:
    data, rewards = rollout(seed=7)
    session = Session(settings("apo"))
    given = session.given(data, rewards)
    session.policy.get_logprobs = lambda read: Batch(logprobs=read["input_ids"] * math.nan)
    result = session.policy.train(given, loss_of(session))
    assert len(session.policy.gradients) == 1
    assert result["all_mb_metrics"]["apo/skipped_logprobs"] == [1.0]


def test_coefficients_that_are_not_finite_skip_their_optimizer_step() -> None:
    data, rewards = rollout(seed=7)
    session = Session(settings("apo", anchor={"name": "reference"}))
    given = session.given(data, rewards)
    far = given["reference_policy_logprobs"].double()
    far[0, int(data["token_mask"][0].argmax())] = 1e308  # finite, but not divided by tau
    given["reference_policy_logprobs"] = far
    result = session.policy.train(given, loss_of(session))
    assert len(session.policy.gradients) == 1
    assert result["all_mb_metrics"]["apo/skipped_coefficients"] == [1.0]


def test_a_reference_that_nothing_asks_for_is_not_read() -> None:
    """The host may leave a placeholder there."""
    data, rewards = rollout(seed=7)
    session = Session(settings("apo"))
    given = session.given(data, rewards)
    given["reference_policy_logprobs"].fill_(math.nan)
    session.policy.train(given, loss_of(session))
    assert len(session.policy.gradients) == 2


def test_too_many_skipped_steps_in_a_row_end_the_run() -> None:
    data, rewards = rollout(seed=8)
    session = Session({**FIXED, "update": {"max_skipped_steps": 2}})
    given = session.given(data, rewards)
    given["prev_logprobs"].fill_(float("nan"))
    with pytest.raises(TrainingStopped, match=r"apo\.update\.max_skipped_steps=2"):
        session.policy.train(given, loss_of(session))


def test_an_update_that_is_not_finite_ends_the_run() -> None:
    data, rewards = rollout(seed=9)
    session = Session({**FIXED, "regularizers": {"kl_coef": 1.0}})
    given = session.given(data, rewards)
    given["reference_policy_logprobs"] = torch.full_like(given["prev_logprobs"], 1e6)
    with pytest.raises(TrainingStopped, match="resume from the last checkpoint"):
        session.policy.train(given, loss_of(session))


def test_findings_are_told_once_per_rl_step() -> None:
    data, rewards = rollout(seed=10)
    session = Session({**FIXED, "diagnostics": {"no_signal": 0.5, "window": 2}})
    for told in (0, 0, 1, 2):
        assert len([line for line in session.lines if "no signal" in line]) == told
        session.train(data, torch.full_like(rewards, 0.3), loss_of(session))


def test_the_reference_anchors_where_it_is_asked_for() -> None:
    data, rewards = rollout(seed=11)
    session = Session(settings("apo", anchor={"name": "reference"}), batch_size=16)
    given = session.given(data, rewards)
    reference = logprobs_of(torch.randn(7, 7).double(), data["input_ids"])
    given["reference_policy_logprobs"] = reference
    session.policy.train(given, loss_of(session))
    leaf = torch.zeros(7, 7, dtype=torch.float64, requires_grad=True)
    new = logprobs_of(leaf, data["input_ids"])[:, 1:]
    mask = data["token_mask"][:, 1:].double()
    advantages = oracle.zscore(rewards.double().view(-1, GROUP))
    COUPLED["apo"](new, reference[:, 1:], mask, advantages).backward()
    assert torch.allclose(session.policy.gradients[0], leaf.grad, rtol=1e-7, atol=1e-12)


class TestBadRollouts:
    def session(self) -> tuple[Session, Batch, Tensor]:
        data, rewards = rollout(seed=12)
        return Session(FIXED), data, rewards

    def test_completions_of_another_prompt(self) -> None:
        session, data, rewards = self.session()
        data["input_ids"][[0, 4]] = data["input_ids"][[4, 0]]
        data["token_mask"][[0, 4]] = data["token_mask"][[4, 0]]
        with pytest.raises(RolloutError, match="beside the prompt of another group"):
            session.train(data, rewards, loss_of(session))

    def test_advantages_that_differ_from_token_to_token(self) -> None:
        session, data, rewards = self.session()
        given = session.given(data, rewards)
        given["advantages"] = given["advantages"].clone()
        given["advantages"][3, 2] += 1.0
        with pytest.raises(RolloutError, match="token to token"):
            session.policy.train(given, loss_of(session))

    def test_rewards_that_are_not_finite(self) -> None:
        session, data, rewards = self.session()
        rewards[2] = float("inf")
        with pytest.raises(RolloutError, match="not all finite"):
            session.train(data, rewards, loss_of(session))

    def test_a_logger_that_is_not_ours(self) -> None:
        session, data, rewards = self.session()
        given = session.given(data, rewards)
        session.policy.train(given, loss_of(session))
        with pytest.raises(RolloutError, match="hand ApoLogger"):
            session.policy.train(given, loss_of(session))

    @pytest.mark.parametrize(("groups", "batch_size"), [(6, 6), (4, 12)])
    def test_global_batches_that_do_not_fit(self, groups: int, batch_size: int) -> None:
        data, rewards = rollout(seed=12, groups=groups)
        session = Session(FIXED, batch_size=batch_size)
        with pytest.raises(RolloutError, match="whole groups of 4"):
            session.train(data, rewards, loss_of(session))


def test_the_logger_is_the_hosts_in_every_other_respect() -> None:
    session = Session(FIXED)
    assert session.logger.log_metrics({}, 1) == "forwarded"
    session.logger.log_histogram([1.0], 1, "train/advantages/histogram")
    assert session.logger.histograms == ["train/advantages/histogram"]
    data, rewards = rollout(seed=13)
    session.train(data, rewards, loss_of(session))
    assert session.logger.histograms[1] == "train/baseline_reward/histogram"


def test_every_objective_trains() -> None:
    data, rewards = rollout(seed=14)
    for name in OBJECTIVES:
        session = Session(settings(name), cut=CUTS["groups across ranks"])
        session.train(data, rewards, ApoLoss(session.run.settings.objective, Regularizers()))
        assert torch.isfinite(session.policy.table).all(), name
        assert float(session.policy.table.abs().max()) > 0.0, name
