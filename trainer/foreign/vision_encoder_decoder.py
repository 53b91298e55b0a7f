"""A vision transformer and GPT-2 with cross-attention, put together.

Where their widths differ, a linear layer stands between them.
"""

from typing import Any

import torch
from torch import Tensor

from trainer.errors import CheckpointError
from trainer.foreign._checkpoint import SpecialIds, Tables, Tensors
from trainer.foreign._vit import side, tower

CLASS = "VisionEncoderDecoderModel"


def tables(config: Any) -> Tables:
    """Returns what ours is built from.

    Raises:
        CheckpointError: another encoder or decoder.
    """
    encoder, decoder = config.encoder, config.decoder
    if (encoder.model_type, decoder.model_type) != ("vit", "gpt2"):
        raise CheckpointError(
            f"{CLASS} of {encoder.model_type} and {decoder.model_type}; vit and gpt2 are supported"
        )
    return Tables(
        tower(encoder, norm_first=False, qkv_bias=encoder.qkv_bias),
        {"name": "linear"},
        {"name": "gpt2", "architecture": decoder.to_dict()},
        decoder.n_positions,
        side(encoder),
    )


def special_ids(model: Any) -> SpecialIds:
    """Returns the ids that its `generate` goes by."""
    chosen, config = model.generation_config, model.config
    start = chosen.decoder_start_token_id
    if start is None:
        start = chosen.bos_token_id
    if start is None:
        start = getattr(config, "decoder_start_token_id", None)
    end = chosen.eos_token_id if chosen.eos_token_id is not None else config.decoder.eos_token_id
    return SpecialIds(start, end, chosen.pad_token_id)


def generation(model: Any) -> Any:
    """Returns how it searches by default."""
    return model.generation_config


def tensors(model: Any) -> Tensors:
    """Returns its weights."""
    projection = getattr(model, "enc_to_dec_proj", None)
    bridge = {} if projection is None else projection.state_dict(prefix="project.")
    return Tensors(model.encoder.state_dict(), bridge, model.decoder.state_dict())


@torch.no_grad()
def logits(model: Any, images: Tensor, token_ids: Tensor) -> Tensor:
    """Returns (B, T, V)."""
    found: Tensor = model(pixel_values=images, decoder_input_ids=token_ids).logits
    return found
