"""Norms of query and key in the real branch actor, and weights that would not reach its sampler."""

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.aligner import grpo_session, shards
from tests.aligner.grpo_session import Case
from tests.aligner.host_ranks import run_ranks

pytestmark = [pytest.mark.pinned, pytest.mark.branch]

NORMS = ("q_layernorm.weight", "k_layernorm.weight")
HEAD_SIZE = 16
WITH_NORMS = {"qk_layernorm": True}


def is_norm(name: str) -> bool:
    return name.endswith(NORMS)


def step(rank: int, case: Case) -> dict[str, Any]:
    """Parameters of the built model, and the gradients of an RL step's optimizer steps."""
    session = grpo_session.open_session(case)
    names = {name: tuple(p.shape) for name, p in session.actor.model.named_parameters()}
    before = shards.full_weights(session.actor) if case.world_size == 1 else None
    rollout = grpo_session.read_rollout(session, grpo_session.made_rollout(case), case)
    gradients = grpo_session.train_on(session, rollout, case)
    return {"names": names, "weights": before, "gradients": gradients}


def build_host_actor(rank: int, model: dict[str, Any]) -> list[str]:
    """Parameters of the host's own actor, without anything of ours, after one of ours was built."""
    from tests.aligner import tiny_actor

    config = tiny_actor.tiny_config("grpo", **model)
    built = tiny_actor.build("grpo", config, 1)
    return [name for name, _ in built.actor.model.named_parameters()]


def choose_layers(rank: int) -> dict[str, Any]:
    """What NeMo's choice gives inside and outside the scope, and what is refused."""
    import importlib

    from megatron.core.models.gpt import gpt_layer_specs

    from nemo_apo.aligner.layer_spec import NEMO_MODULE, query_key_norms
    from nemo_apo.config import ConfigError
    from nemo_apo.plugin.interface_guard import InterfaceMismatch

    nemo = importlib.import_module(NEMO_MODULE)
    original = nemo.get_specs
    found: dict[str, Any] = {}

    def norms(*args: Any) -> list[str]:
        parts = nemo.get_specs(*args).submodules.self_attention.submodules
        return [parts.q_layernorm.__name__, parts.k_layernorm.__name__]

    found["outside"] = norms("", None, False)
    with query_key_norms(False):
        found["unwanted"] = nemo.get_specs is original
    with query_key_norms(True):
        found["local"] = norms("", None, False)
    # Stands for Megatron's builder for Transformer Engine, which is not installed.
    local = gpt_layer_specs.get_gpt_layer_local_spec

    def made_for_te(qk_layernorm: bool = False, **_: Any) -> Any:
        layer = local()
        norm = type("TENorm", (), {}) if qk_layernorm else type("IdentityOp", (), {})
        layer.submodules.self_attention.submodules.q_layernorm = norm
        layer.submodules.self_attention.submodules.k_layernorm = norm
        return layer

    gpt_layer_specs.get_gpt_layer_with_transformer_engine_spec = made_for_te
    nemo.get_gpt_layer_with_transformer_engine_spec = lambda *_, **__: made_for_te()
    found["te outside"] = norms("", None, True)
    with query_key_norms(True):
        found["te"] = norms("", None, True)
        found["te by name"] = norms("te_gpt", None, False)
        try:
            nemo.get_specs("megatron_falcon_gpt", None, True)
        except ConfigError as error:
            found["falcon"] = str(error)
    found["restored"] = nemo.get_specs is original
    del nemo.get_specs
    try:
        with query_key_norms(True):
            pass
    except InterfaceMismatch as error:
        found["missing"] = str(error)
    return found


def refuse_local_layers(rank: int, case: Case) -> dict[str, Any]:
    """The local layers name some weights otherwise than those that the host can send."""
    from nemo_apo.aligner.branch import conversion_dict
    from nemo_apo.config import ConfigError

    session = grpo_session.open_session(case)
    actor = session.actor
    table = conversion_dict.mcore_te_to_hf_llama
    try:
        actor.prepare_for_inference()
    except ConfigError as error:
        return {"refused": str(error), "table": sorted(table)}
    return {"refused": None, "table": sorted(table)}


def send_once(rank: int, case: Case) -> list[int]:
    """Sizes of the state dictionaries that are looked at, over three rollouts."""
    from nemo_apo.aligner.branch import conversion_dict

    actor = grpo_session.open_session(case).actor
    looked: list[int] = []
    state_dict = actor.state_dict
    for name in state_dict():
        conversion_dict.mcore_te_to_hf_llama.setdefault(name, {"hf": name})

    def watched(*args: Any, **kwargs: Any) -> dict[str, Tensor]:
        weights = state_dict(*args, **kwargs)
        looked.append(len(weights))
        return weights

    actor.state_dict = watched
    for _ in range(3):
        actor.prepare_for_inference()
        actor.finish_inference()
    return looked


@pytest.fixture(scope="module")
def plain() -> dict[str, Any]:
    return run_ranks(1, step, Case())[0]


@pytest.fixture(scope="module")
def normed() -> dict[str, Any]:
    return run_ranks(1, step, Case(model=WITH_NORMS))[0]


def test_the_model_has_norms_that_are_trained(normed: dict[str, Any]) -> None:
    norms = [name for name in normed["names"] if is_norm(name)]
    assert len(norms) == 2 * 2, "query and key, two layers"
    assert {normed["names"][name] for name in norms} == {(HEAD_SIZE,)}
    assert len(normed["gradients"]) == 2
    for name in norms:
        assert torch.equal(normed["weights"][name], torch.ones(HEAD_SIZE))
        for gradients in normed["gradients"]:
            assert float(gradients[name].abs().max()) > 1e-6


def test_without_the_key_nothing_changes(plain: dict[str, Any], normed: dict[str, Any]) -> None:
    [host] = run_ranks(1, build_host_actor, {})
    assert sorted(plain["names"]) == sorted(host)
    assert not any(map(is_norm, host))
    others = {name: shape for name, shape in normed["names"].items() if not is_norm(name)}
    assert others == plain["names"]


def test_without_our_actor_the_host_loses_the_norms() -> None:
    """Why this is needed; once it fails, NeMo passes the key on by itself."""
    [host] = run_ranks(1, build_host_actor, WITH_NORMS)
    assert not any(map(is_norm, host))


def test_pipeline_stages_have_the_norms_of_their_layers(normed: dict[str, Any]) -> None:
    for rank in run_ranks(2, step, Case(pp=2, model=WITH_NORMS)):
        norms = [name for name in rank["names"] if is_norm(name)]
        assert len(norms) == 2
        assert all(float(rank["gradients"][0][name].abs().max()) > 1e-6 for name in norms)


def test_the_choice_is_wrapped_only_while_a_model_is_built() -> None:
    [found] = run_ranks(1, choose_layers)
    assert found["outside"] == ["IdentityOp"] * 2
    assert found["unwanted"]
    assert len(set(found["local"])) == 1
    assert "Norm" in found["local"][0]
    assert found["te outside"] == ["IdentityOp"] * 2
    assert found["te"] == found["te by name"] == ["TENorm"] * 2
    assert "model.name=megatron_falcon_gpt" in found["falcon"]
    assert found["restored"]
    assert "get_specs does not exist" in found["missing"]


def test_a_weight_that_would_not_reach_the_sampler_is_refused_on_all_ranks() -> None:
    backend = {"grpo.inference_backend.type": "vllm", **WITH_NORMS}
    ranks = run_ranks(2, refuse_local_layers, Case(pp=2, model=backend))
    assert ranks[0] == ranks[1]
    assert ranks[0]["refused"].startswith("trainer.grpo.inference_backend.type=vllm: ")
    assert "layers.{l}.input_layernorm.weight" in ranks[0]["refused"]
    assert "q_layernorm" not in ranks[0]["refused"]
    assert "model.decoder.layers.{l}.self_attention.q_layernorm.weight" in ranks[0]["table"]


def test_other_backends_leave_the_table_alone() -> None:
    [found] = run_ranks(1, refuse_local_layers, Case())
    assert found["refused"] is None
    assert not any("layernorm" in name and "q_" in name for name in found["table"])


def test_weights_are_looked_at_before_the_first_rollout_only() -> None:
    backend = {"grpo.inference_backend.type": "trt_llm_pytorch"}
    [looked] = run_ranks(1, send_once, Case(model=backend))
    assert len(looked) == 1
