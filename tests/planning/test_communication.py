"""Bytes sent, by hand, and how they grow."""

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nemo_apo.planning.communication import communication
from nemo_apo.planning.settings import Cluster
from tests.planning.small import layout_of, question, shapes_of


def sent(asked, **sizes: int) -> dict[str, int]:
    """Bytes by kind."""
    traffic = communication(asked, shapes_of(asked), layout_of(asked, **sizes))
    return {kind: one.bytes for kind, one in traffic.items()}


def test_by_hand() -> None:
    """The layout of ``test_memory``: hidden states of 2 x 8 x 8 = 128 bytes, rings of two ranks."""
    assert sent(question(), tensor=2, pipeline=2) == {
        # 2 micro-batches; 10 gathers or scatters in each of 2 layers and two around the log-probs;
        # half of it sent.
        "tensor": 2 * (10 * 2 + 2) * 128 // 2,
        "context": 0,
        "data": (4 + 2) * 752 // 2,
        "group scalars": 8 * 8 * 4 // 2,
        "pipeline": 2 * 128 // 2,
    }


def test_context_parallelism_by_hand() -> None:
    """4 layers, one micro-batch of 4 tokens on a rank, 2 x 4 numbers of keys and values each."""
    keys_and_values = 4 * 2 * 4 * 2
    assert sent(question(), context=2)["context"] == 4 * 3 * keys_and_values
    again = question(recompute="full")
    assert sent(again, context=2)["context"] == 4 * 4 * keys_and_values


def test_one_gpu_sends_nothing() -> None:
    alone = question(cluster=Cluster(gpus_per_node=1))
    assert set(sent(alone).values()) == {0}


def test_sequence_parallelism_gathers_again_and_scatters_what_else_is_all_reduced() -> None:
    split = sent(question(), tensor=2)["tensor"]
    whole = sent(question(sequence_parallel=False), tensor=2)["tensor"]
    # One micro-batch, half of it sent. Twice more in each of 4 layers; around the log-probs two
    # operations of 128 bytes in place of an all-reduce of float32 gradients, twice 256 bytes.
    assert split - whole == (4 * 2 * 128 + 2 * 128 - 2 * 256) // 2


def test_without_the_distributed_optimizer_gradients_are_all_reduced() -> None:
    plain = sent(question(distributed_optimizer=False), tensor=2, pipeline=2)
    assert plain["data"] == 2 * 4 * 752 // 2


@pytest.mark.parametrize(
    ("nodes", "sizes", "links"),
    [
        (1, {"tensor": 2, "pipeline": 2}, {"data": ("NVLink", 450), "pipeline": ("NVLink", 450)}),
        # 2 data ranks in a node of 8 GPUs use 2 of its ports.
        (4, {"tensor": 2, "context": 2}, {"data": ("InfiniBand", 200), "tensor": ("NVLink", 450)}),
        (4, {"tensor": 2, "pipeline": 4}, {"pipeline": ("InfiniBand", 50)}),
        (4, {}, {"data": ("InfiniBand", 400)}),
    ],
)
def test_the_link_of_a_group(nodes: int, sizes: dict[str, int], links: dict) -> None:
    asked = question(cluster=Cluster(nodes=nodes), workload={"sequences": 32})
    traffic = communication(asked, shapes_of(asked), layout_of(asked, **sizes))
    for kind, (link, speed) in links.items():
        assert traffic[kind].link == link
        assert traffic[kind].seconds == pytest.approx(traffic[kind].bytes / (speed * 1e9))


@given(st.sampled_from([8, 16, 64]), st.integers(1, 4))
def test_tensor_traffic_grows_with_the_tokens_and_data_traffic_does_not(
    length: int, times: int
) -> None:
    short = question(workload={"sequence_length": length})
    workload = dataclasses.replace(short.workload, sequence_length=length * times)
    long = dataclasses.replace(short, workload=workload)
    first, second = sent(short, tensor=2), sent(long, tensor=2)
    assert second["tensor"] == times * first["tensor"]
    assert second["data"] == first["data"]
