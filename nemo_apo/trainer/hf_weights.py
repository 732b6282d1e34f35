"""Weights of a Hugging Face checkpoint in megatron's modules, and back.

A rank reads the slices of its own stage and tensor-parallel share and nothing else: at no time
does a process hold more of the checkpoint than its own parameters and one slice. The tables that
say what belongs where are in ``nemo_apo.hf_checkpoint.mapping``.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from megatron.core.models.gpt import GPTModel
from torch import Tensor

from nemo_apo.config import ConfigError
from nemo_apo.hf_checkpoint.decoder import Decoder, UnfitCheckpoint
from nemo_apo.hf_checkpoint.mapping import (
    EMBEDDING,
    MAPPING,
    OUTPUT,
    VOCABULARY,
    Piece,
    Share,
    Target,
    pieces,
    targets,
)
from nemo_apo.hf_checkpoint.shards import Shards, open_shards
from nemo_apo.parallel.layout import Layout
from nemo_apo.parallel.together import RankError, together
from nemo_apo.trainer.layer_specs import local_name

_LAYERS = "decoder.layers."


def load_hf_weights(
    path: str, decoder: Decoder, modules: Sequence[GPTModel], layout: Layout
) -> None:
    """Put a checkpoint's weights into this rank's chunks of the model; collective.

    Raises:
        ConfigError: on every rank, if one could not read its part.
    """

    def load() -> None:
        with open_shards(Path(path), decoder) as shards:
            for module in modules:
                fill_module(module, shards, decoder, layout.tensor_rank, layout.tensor_size)

    try:
        together(load)
    except RankError as error:
        raise ConfigError(f"model.path={path}: {error}") from error


@torch.no_grad()
def fill_module(module: GPTModel, shards: Shards, decoder: Decoder, rank: int, size: int) -> None:
    """Set every parameter of a module from a checkpoint, padding of the vocabulary to zero.

    Args:
        module: one chunk of a stage.
        shards: the checkpoint.
        decoder: the model.
        rank, size: of the tensor-parallel group.
    """
    sources = _by_parameter(decoder)
    for name, parameter in named_weights(module):
        share = Share(rank, size, parameter.shape[0])
        is_vocabulary = any(target.layout == VOCABULARY for _, target in sources[name])
        if is_vocabulary:
            parameter.zero_()
        filled = 0
        for source, target in sources[name]:
            for piece in pieces(decoder, target, share):
                read = shards.read(source, piece.rows, piece.columns)
                parameter[piece.target_rows].copy_(read)
                filled += read.numel()
                if source == EMBEDDING and shards.has_spare_output:
                    _check_spare(shards, piece, read)
        assert is_vocabulary or filled == parameter.numel(), (name, filled, parameter.shape)


def tensors_of(module: GPTModel, decoder: Decoder) -> Iterator[tuple[str, Tensor]]:
    """The checkpoint's tensors of a whole model on this rank alone, one at a time, in its dtype."""
    weights = dict(named_weights(module))
    for name, target in targets(decoder).items():
        yield name, whole_tensor(weights[target.megatron], target, decoder)


def whole_tensor(weight: Tensor, target: Target, decoder: Decoder) -> Tensor:
    """One tensor of the checkpoint out of the parameter that holds it whole."""
    parts = pieces(decoder, target, Share(0, 1, weight.shape[0]))
    return torch.cat([weight.detach()[piece.target_rows] for piece in parts])


def named_weights(module: GPTModel) -> Iterator[tuple[str, torch.nn.Parameter]]:
    """Parameters of a chunk by the names of ``MAPPING``, layers counted over the whole model.

    The last of several stages holds the tied embeddings once more, as its output layer.
    """
    layers = {
        str(place): layer.layer_number - 1 for place, layer in enumerate(module.decoder.layers)
    }
    for name, parameter in module.named_parameters():
        if not name.startswith(_LAYERS):
            yield name, parameter
            continue
        place, _, rest = name.removeprefix(_LAYERS).partition(".")
        yield local_name(f"{_LAYERS}{layers[place]}.{rest}"), parameter


def _by_parameter(decoder: Decoder) -> dict[str, list[tuple[str, Target]]]:
    """The tensors that each megatron parameter is made of."""
    found: dict[str, list[tuple[str, Target]]] = {}
    for name, target in targets(decoder).items():
        found.setdefault(target.megatron, []).append((name, target))
    if decoder.tied_embeddings:
        found[MAPPING[OUTPUT].megatron] = [(EMBEDDING, MAPPING[EMBEDDING])]
    return found


def _check_spare(shards: Shards, piece: Piece, embedding: Tensor) -> None:
    if not torch.equal(shards.read(OUTPUT, piece.rows, piece.columns), embedding):
        raise UnfitCheckpoint(
            f"config.json ties the embeddings, but {OUTPUT} differs from {EMBEDDING}"
        )
