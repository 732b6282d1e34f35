"""What cannot be trained on: one clear error on every rank, no hang; what can be, is settled."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from nemo_apo import record
from tests.aligner import grpo_session
from tests.aligner.grpo_session import Case
from tests.aligner.host_ranks import run_ranks

pytestmark = [pytest.mark.pinned, pytest.mark.branch]

CASE = Case(dp=2, batch_size=8, prompts=4, group_size=4, micro_batch_size=2)
Change = Callable[[Any], None]


def message_of(rank: int, case: Case, change: Change) -> str:
    """The error of an RL step on a changed rollout; empty if it goes through."""
    session = grpo_session.open_session(case)
    rollout = grpo_session.read_rollout(session, grpo_session.made_rollout(case), case)
    change(rollout)
    try:
        grpo_session.train_on(session, rollout, case)
    except ValueError as error:
        return f"{type(error).__name__}: {error}"
    return ""


def _drop_ids(rollout: Any) -> None:
    del rollout["apo_group_id"]


def _merge_groups(rollout: Any) -> None:
    ids = rollout["apo_group_id"]
    ids[ids == 101] = 100


def _shuffle_ids(rollout: Any) -> None:
    ids = rollout["apo_group_id"]
    ids[[0, 1]] = ids[[1, 0]]


def _shuffle_answers(rollout: Any) -> None:
    for name in ("response_tokens", "logprobs"):
        rollout[name] = rollout[name].roll(1, dims=0)


def _foreign_token(rollout: Any) -> None:
    rollout["response_tokens"][3, 7] = 300  # a padded row of the output layer


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_drop_ids, "the rollout has no column apo_group_id"),
        (_merge_groups, "samples_per_prompt=4, but the rollout has 1 of 3 groups of other sizes"),
        (_shuffle_ids, "completions stand beside the prompt of another group"),
        (_shuffle_answers, "the rollout's log-probs are not those of the actor's last pass"),
        (_foreign_token, r"token ids must lie in [0, 259), got "),
    ],
)
def test_a_rollout_that_lost_its_groups_is_refused(change: Change, message: str) -> None:
    for error in run_ranks(CASE.world_size, message_of, CASE, change):
        assert error.startswith("RolloutError: ")
        assert message in error


def test_a_batch_that_cannot_hold_whole_groups_is_refused() -> None:
    def build(rank: int) -> str:
        try:
            grpo_session.open_session(replace(CASE, batch_size=6, micro_batch_size=1))
        except ValueError as error:
            return str(error)
        return ""

    for error in run_ranks(2, build):
        assert error == (
            "model.global_batch_size=6: must be a multiple of trainer.grpo.samples_per_prompt=4: "
            "an optimizer step holds whole groups"
        )


def settled(rank: int, case: Case, change: Change) -> dict[str, Any]:
    """Metrics, gradients and state of an RL step on a changed rollout."""
    session = grpo_session.open_session(case)
    before = [w.detach().clone() for w in session.actor.model.parameters()]
    rollout = grpo_session.read_rollout(session, grpo_session.made_rollout(case), case)
    change(rollout)
    data, metrics = session.trainer.create_grpo_training_data_from_inferences(rollout)
    error = ""
    try:
        _run(session, data, case)
    except RuntimeError as raised:
        error = str(raised)
    after = session.actor.model.parameters()
    return {
        "metrics": metrics,
        "error": error,
        "changed": any(not torch.equal(a, b) for a, b in zip(before, after, strict=True)),
        "finite": all(bool(torch.isfinite(w).all()) for w in session.actor.model.parameters()),
        "state": session.actor.apo_state,
        "optim_steps": session.trainer.grpo_optimization_step,
    }


def _run(session: Any, data: dict[str, Any], case: Case) -> None:
    from nemo.collections.nlp.modules.common.megatron.utils import get_iterator_k_split

    steps = data["response_tokens"].shape[0] // (case.batch_size // case.dp)
    session.trainer.run_training(get_iterator_k_split(data, steps))


def test_a_failed_grade_drops_its_whole_group() -> None:
    def fail_one(rollout: Any) -> None:
        rollout["rewards"][5] = float("nan")

    case = replace(CASE, apo={"groups.failed_grade": "drop"})
    for result in run_ranks(2, settled, case, fail_one):
        assert result["metrics"][record.DROPPED_GROUPS] == 1
        assert result["metrics"][record.REWARD_FAILED] == 1
        assert result["changed"]
        assert result["finite"]
        assert result["optim_steps"] == 2


def test_what_is_not_finite_in_a_dropped_group_does_no_harm() -> None:
    def fail_one(rollout: Any) -> None:
        rollout["rewards"][5] = float("nan")
        rollout["logprobs"][5] = float("nan")

    def broken(rank: int) -> dict[str, Any]:
        from nemo_apo.aligner import grpo_trainer

        grpo_trainer.check_own = lambda *args: None
        apo = {"groups.failed_grade": "drop", "objective.name": "grpo"}
        return settled(rank, replace(CASE, apo=apo), fail_one)

    for result in run_ranks(2, broken):
        assert result["optim_steps"] == 2
        assert result["changed"]
        assert result["finite"]


def test_a_step_whose_groups_are_all_dropped_takes_no_optimizer_step() -> None:
    def fail_half(rollout: Any) -> None:
        rollout["rewards"][rollout["apo_group_id"] < 102] = float("nan")

    case = replace(CASE, apo={"groups.failed_grade": "drop"})
    for result in run_ranks(2, settled, case, fail_half):
        assert result["metrics"][record.DROPPED_GROUPS] == 2
        assert result["optim_steps"] == 1
        assert result["state"].skipped_in_a_row == 0


def test_log_probs_that_are_not_finite_skip_the_optimizer_steps_that_hold_them() -> None:
    """The third group's, which the second optimizer step holds; the first one is taken."""

    def break_one(rollout: Any) -> None:
        rollout["logprobs"][2, 6] = float("nan")

    def broken(rank: int) -> dict[str, Any]:
        # The actor's own pass says the same, or the rollout would be refused as another one's.
        from nemo_apo.aligner import grpo_trainer

        grpo_trainer.check_own = lambda *args: None
        return settled(rank, CASE, break_one)

    for result in run_ranks(2, broken):
        assert result["changed"]
        assert result["finite"]
        assert result["optim_steps"] == 1
        assert result["state"].skipped_in_a_row == 1
        assert result["state"].schedule.alpha == 0.9
        assert result["error"] == ""


def test_a_rollout_without_a_finite_group_leaves_weights_and_schedule_alone() -> None:
    def break_all(rollout: Any) -> None:
        rollout["logprobs"][:4, 5] = float("nan")

    def broken(rank: int) -> dict[str, Any]:
        from nemo_apo.aligner import grpo_trainer

        grpo_trainer.check_own = lambda *args: None
        return settled(rank, CASE, break_all)

    for result in run_ranks(2, broken):
        assert not result["changed"]
        assert result["state"].skipped_in_a_row == 2
        assert result["state"].schedule.alpha is None


def poisoned(rank: int, case: Case, limit: int) -> dict[str, Any]:
    """An RL step in which one rank's gradient turns infinite at every optimizer step."""
    from nemo_apo.aligner.grpo import ApoGRPOActor

    poison = ApoGRPOActor.finish_training_step

    def finish(self: Any) -> None:
        if rank == 1:
            next(iter(self.model.parameters())).grad[0, 0] = float("inf")
        poison(self)

    ApoGRPOActor.finish_training_step = finish
    case = replace(case, apo={"update.max_skipped_steps": limit})
    return settled(rank, case, lambda rollout: None)


def test_an_infinite_gradient_on_one_rank_is_skipped_by_all() -> None:
    for result in run_ranks(2, poisoned, CASE, 10):
        assert not result["changed"]
        assert result["state"].skipped_in_a_row == 2
        assert result["optim_steps"] == 0


def test_too_many_skipped_steps_end_the_run_on_all_ranks() -> None:
    for result in run_ranks(2, poisoned, CASE, 2):
        assert result["error"].startswith("2 optimizer steps in a row were skipped")


def resumed(rank: int, checkpoint: dict[str, Any], apo: dict[str, Any]) -> str:
    """What the actor says to a checkpoint: its error, or the RL steps it then stands at."""
    session = grpo_session.open_session(replace(CASE, dp=1, apo=apo))
    try:
        session.actor.on_load_checkpoint(dict(checkpoint))
    except ValueError as error:
        return str(error)
    return f"at {session.actor.apo_state.rl_steps}"


def test_a_training_checkpoint_without_our_state_is_refused_unless_told_otherwise() -> None:
    foreign = {"global_step": 7, "state_dict": {}}
    (error,) = run_ranks(1, resumed, foreign, {})
    assert "holds no APO state" in error
    assert "model.apo.resume.without_state=fresh" in error
    assert run_ranks(1, resumed, foreign, {"resume.without_state": "fresh"}) == ["at 0"]
    assert run_ranks(1, resumed, {"state_dict": {}}, {}) == ["at 0"], "initial weights have none"


def test_the_state_of_another_schedule_is_refused() -> None:
    def saved(rank: int) -> dict[str, Any]:
        session = grpo_session.open_session(replace(CASE, dp=1))
        checkpoint: dict[str, Any] = {}
        session.actor.on_save_checkpoint(checkpoint)
        return {"global_step": 1, "state_dict": {}, "nemo_apo": checkpoint["nemo_apo"]}

    (checkpoint,) = run_ranks(1, saved)
    assert run_ranks(1, resumed, checkpoint, {}) == ["at 0"]
    (error,) = run_ranks(1, resumed, checkpoint, {"schedule.name": "ess"})
    assert error.startswith("model.apo.schedule.name=ess: the checkpoint was trained with")
