"""Bytes by hand, and properties that any layout has to keep."""

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nemo_apo.parallel import logprobs
from nemo_apo.planning.activations import layer_activations
from nemo_apo.planning.layout import Layout, Refused
from nemo_apo.planning.memory import (
    LOG_PROB_CHUNK,
    Memory,
    fullest_stage,
    log_prob_workspace,
    optimizer_bytes,
    sampler_room,
    stage_memory,
    stage_parameters,
)
from nemo_apo.planning.settings import ATTENTIONS, Cluster, Question, Sampler, model_named
from nemo_apo.planning.shapes import Shapes
from tests.planning.small import SMALL, layout_of, question, shapes_of

POWERS = st.sampled_from([1, 2, 4, 8])


class TestByHand:
    """TP 2 x PP 2 x DP 2, sequence parallel, 2 micro-batches of one sequence of 8 tokens.

    A layer has 8 x (4 + 2 x 2) x 2 = 128 weights for qkv, 64 behind attention, 3 x 8 x 16 = 384 in
    the SwiGLU: 576, of which a rank holds 288, and 16 + 4 norms. A stage has two layers, 616, and
    half of the 32 x 8 embedding or output layer, 128; the last one 8 of the final norm.
    """

    asked = question()
    shapes = shapes_of(asked)
    layout = layout_of(asked, tensor=2, pipeline=2)

    def test_parameters(self) -> None:
        assert stage_parameters(self.shapes, self.layout, 0) == 616 + 128
        assert stage_parameters(self.shapes, self.layout, 1) == 616 + 128 + 8

    def test_what_a_layer_keeps(self) -> None:
        norms = 4 * 2 * 8 * 8 // 2
        # 12 numbers before the norms of query and key, 16 that attention reads, 8 that it writes.
        attention = 2 * 8 * (12 + 16 + 8) // 2 + 4 * 8 * 2
        feed_forward = 3 * 2 * 8 * 16 // 2
        assert norms + attention + feed_forward == 992
        assert layer_activations(self.asked, self.shapes, self.layout) == 992

    def test_the_first_stage(self) -> None:
        assert stage_memory(self.asked, self.shapes, self.layout, 0) == Memory(
            weights=2 * 744,
            gradients=4 * 744,
            optimizer=12 * 744 // 2,
            activations=2 * 2 * 992,  # two micro-batches in flight, two layers
            working=384 + 2 * 2 * 8 * 8,
            log_probs=0,
            reference=0,
            sampler=0,
        )

    def test_the_last_stage_is_the_fullest(self) -> None:
        stage, memory = fullest_stage(self.asked, self.shapes, self.layout)
        assert stage == 1
        assert memory == Memory(
            weights=2 * 752,
            gradients=4 * 752,
            optimizer=12 * 752 // 2,
            activations=1 * 2 * 992 + 2 * 2 * 8 * 8 // 2,  # and around the final norm
            working=640,
            # 16 rows: logits in float32, slope in bfloat16; hidden states 8 wide with a float32
            # gradient and a float32 product; the float32 product for the output layer.
            log_probs=8 * (16 * (4 + 2) + 8 * (4 + 4 + 2)) + 4 * 16 * 8,
            reference=0,
            sampler=0,
        )
        assert memory.total == 13696

    def test_full_recomputation_keeps_the_input_alone(self) -> None:
        full = question(recompute="full")
        assert layer_activations(full, self.shapes, self.layout) == 2 * 8 * 8 // 2

    def test_float32_weights_need_no_main_copy(self) -> None:
        float32 = question(dataclasses.replace(SMALL, params_dtype="float32"))
        memory = stage_memory(float32, self.shapes, self.layout, 0)
        assert (memory.weights, memory.gradients, memory.optimizer) == (2976, 2976, 2976)

    def test_a_tied_embedding_is_held_by_both_ends(self) -> None:
        tied = dataclasses.replace(self.shapes, tied=True)
        assert stage_parameters(tied, self.layout, 1) == 752
        assert stage_parameters(tied, Layout(1, 1, 1, 8, 1, False, 1), 0) == tied.parameters

    def test_a_reference_is_a_second_copy(self) -> None:
        memory = stage_memory(
            question(workload={"reference_on_gpu": True}), self.shapes, self.layout, 0
        )
        assert memory.reference == memory.weights


def qwen(name: str = "qwen3_8b", **parallel: object) -> tuple[Question, Shapes]:
    """A real model on many GPUs."""
    asked = question(
        model_named(name),
        Cluster(nodes=64),
        {"sequence_length": 4096, "sequences": 512, "vocab_size": 151936},
        **parallel,
    )
    return asked, shapes_of(asked)


@given(POWERS, st.sampled_from([1, 2, 4, 6]), st.sampled_from(["qwen3_4b", "qwen3_8b"]))
def test_stages_and_tensor_ranks_add_up_to_the_model(tensor: int, pipeline: int, name: str) -> None:
    shapes = qwen(name)[1]
    layout = Layout(tensor, pipeline, 1, 1, 1, tensor > 1, 1)
    held = sum(stage_parameters(shapes, layout, stage) for stage in range(pipeline)) * tensor
    norms = shapes.layers * shapes.layer_norms + shapes.hidden
    twice = shapes.embedding if shapes.tied and pipeline > 1 else 0
    assert held == shapes.parameters + (tensor - 1) * norms + twice


@given(st.sampled_from([(1, 2), (2, 4), (4, 8)]), st.sampled_from([1, 2, 4]))
def test_more_tensor_ranks_never_need_more(sizes: tuple[int, int], pipeline: int) -> None:
    asked, shapes = qwen()
    few, many = (stage_memory(asked, shapes, layout_of(asked, t, pipeline), 0) for t in sizes)
    for part in ("weights", "gradients", "activations", "log_probs"):
        assert getattr(many, part) <= getattr(few, part)


@given(st.integers(1, 10**9), st.integers(1, 4096))
def test_shards_of_the_optimizer_add_up_to_the_whole(parameters: int, replicas: int) -> None:
    whole = optimizer_bytes(question(distributed_optimizer=False), parameters, replicas)
    shard = optimizer_bytes(question(), parameters, replicas)
    assert whole == 12 * parameters
    assert 0 <= replicas * shard - whole < 12 * replicas


@given(POWERS, POWERS, st.sampled_from([1, 2, 4, 6]))
def test_more_context_ranks_keep_fewer_activations(few: int, more: int, pipeline: int) -> None:
    asked, shapes = qwen()
    one = Layout(2, pipeline, few, 4, 1, True, 64)
    other = dataclasses.replace(one, context=few * more)
    kept, kept_by_more = (
        stage_memory(asked, shapes, layout, 0).activations for layout in (one, other)
    )
    assert kept == more * kept_by_more


@given(POWERS, st.booleans(), st.sampled_from(ATTENTIONS))
def test_recomputation_keeps_less(tensor: int, sequence: bool, attention: str) -> None:
    kept = []
    for recompute in ("full", "selective", "none"):
        asked, shapes = qwen(recompute=recompute)
        workload = dataclasses.replace(asked.workload, attention=attention)
        asked = dataclasses.replace(asked, workload=workload)
        layout = Layout(tensor, 1, 1, 8, 1, sequence and tensor > 1, 64)
        kept.append(layer_activations(asked, shapes, layout))
    assert kept[0] < kept[1] < kept[2]


@given(st.integers(1, 4096), st.integers(1, 4096))
def test_longer_sequences_never_need_less(length: int, more: int) -> None:
    totals = []
    for tokens in (length, length + more):
        asked = question(workload={"sequence_length": tokens, "sequences": 8})
        totals.append(fullest_stage(asked, shapes_of(asked), layout_of(asked))[1].total)
    assert totals[0] < totals[1]


def test_the_chunk_is_that_of_the_kernel() -> None:
    assert LOG_PROB_CHUNK == logprobs.CHUNK


def test_a_larger_vocabulary_needs_no_more_log_prob_workspace() -> None:
    asked, shapes = qwen()
    twice = dataclasses.replace(shapes, vocabulary=2 * shapes.vocabulary)
    layout = layout_of(asked)
    assert log_prob_workspace(asked, twice, layout) == log_prob_workspace(asked, shapes, layout)


class TestSampler:
    def test_its_share_is_weights_and_keys_and_values(self) -> None:
        asked, shapes = qwen()
        asked = dataclasses.replace(asked, sampler=Sampler(0.5, 2))
        room = sampler_room(asked, shapes, layout_of(asked))
        assert room is not None
        assert room.weights == 8_190_735_360
        assert room.weights + room.cache == 40_000_000_000
        # Keys and values of 36 layers, 4 of the 8 groups, 128 numbers of 2 bytes.
        assert room.cached_tokens == room.cache // (2 * 36 * 4 * 128 * 2)

    def test_elsewhere_it_keeps_nothing(self) -> None:
        asked, shapes = qwen()
        assert sampler_room(asked, shapes, layout_of(asked)) is None

    @pytest.mark.parametrize(
        ("sampler", "message"),
        [
            (Sampler(0.1), "sampler.share=0.1: must hold the sampler's weights and one sequence"),
            (Sampler(0.5, 3), "parallel_size=3: must divide cluster.gpus_per_node=8"),
        ],
    )
    def test_a_share_that_does_not_do(self, sampler: Sampler, message: str) -> None:
        asked, shapes = qwen()
        asked = dataclasses.replace(asked, sampler=sampler)
        with pytest.raises(Refused, match=message):
            sampler_room(asked, shapes, layout_of(asked))


def test_the_small_model_is_the_one_of_the_hand_calculation() -> None:
    assert shapes_of(question()).parameters == 4 * (576 + 20) + 2 * 256 + 8
