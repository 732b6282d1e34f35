"""The host's own ``setup`` and ``grpo_train`` under APO: steps, figures, checkpoints, resume."""

import math
import shutil
from pathlib import Path

import pytest

from nemo_apo.nemo_rl import run_grpo
from tests.nemo_rl import host_run

pytestmark = [
    pytest.mark.nemo_rl,
    pytest.mark.slow(reason="starts Ray, two workers and a math environment, some of them twice"),
]

STEPS = 3
# Its memory is of rewards and entropies, so an error in either of them shows in alpha.
SCHEDULE = ("apo.schedule.alpha_min=0.4", "apo.schedule.rho=0.5")


@pytest.fixture(scope="module", params=[1, 2], ids=["dtensor v1", "dtensor v2"])
def backend(request: pytest.FixtureRequest) -> int:
    return int(request.param)


@pytest.fixture(scope="module")
def ran(
    host_ray: None, model: str, backend: int, tmp_path_factory: pytest.TempPathFactory
) -> host_run.Ran:
    """A run of a few RL steps, each of two optimizer steps, saved after every one."""
    folder = tmp_path_factory.mktemp("run")
    return host_run.run(model, folder, STEPS, backend, *SCHEDULE)


def test_alpha_moves_and_is_logged_under_the_hosts_name(ran: host_run.Ran) -> None:
    alphas = ran.logged("train/apo/alpha")
    assert sorted(alphas) == list(range(1, STEPS + 1))
    assert alphas[1] == pytest.approx(0.9)
    assert len(set(alphas.values())) == STEPS, "a schedule that does not move proves nothing"
    assert ran.state(STEPS)["schedule"]["alpha"] == pytest.approx(alphas[STEPS])


def test_figures_agree_with_the_hosts_own(ran: host_run.Ran) -> None:
    assert ran.logged("train/apo/reward_mean") == pytest.approx(ran.logged("train/reward"))
    assert ran.logged("train/loss") == pytest.approx(ran.logged("train/apo/objective"))
    for name in ("loss", "grad_norm", "gen_kl_error", "token_mult_prob_error"):
        values = ran.logged(f"train/{name}")
        assert len(values) == STEPS
        assert all(math.isfinite(value) for value in values.values()), name
    # Generation runs on the policy's weights, copied after every step.
    assert max(ran.logged("train/gen_kl_error").values()) < 1e-4
    assert set(ran.logged("train/apo/skipped_steps").values()) == {0.0}


def test_training_changes_the_policy(ran: host_run.Ran) -> None:
    """The second optimizer step of a rollout sees a policy that has left its anchor."""
    assert min(ran.logged("train/apo/anchor_drift").values()) > 1e-3
    assert min(ran.logged("train/grad_norm").values()) > 1e-3


def test_resume_goes_on_bit_for_bit(
    ran: host_run.Ran, model: str, backend: int, tmp_path: Path
) -> None:
    shutil.copytree(ran.checkpoint(1), tmp_path / "checkpoints" / "step_1")
    resumed = host_run.run(model, tmp_path, STEPS, backend, *SCHEDULE)
    for step in range(2, STEPS + 1):
        assert resumed.state(step) == ran.state(step)
    whole = ran.logged("train/apo/alpha")
    assert resumed.logged("train/apo/alpha") == {step: whole[step] for step in (2, 3)}
    for name, weight in ran.weights.items():
        assert resumed.weights[name].equal(weight), name


def test_a_checkpoint_without_our_state_is_refused(
    ran: host_run.Ran,
    model: str,
    backend: int,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    copy = tmp_path / "checkpoints" / "step_1"
    shutil.copytree(ran.checkpoint(1), copy)
    (copy / "policy" / "nemo_apo.json").unlink()
    with pytest.raises(SystemExit) as error:
        host_run.run(model, tmp_path, STEPS, backend, *SCHEDULE)
    assert error.value.code == run_grpo.USER_ERROR
    said = capsys.readouterr().err.splitlines()[-1]
    assert "holds no APO state" in said
    assert "apo.resume.without_state=fresh" in said
