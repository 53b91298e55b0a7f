"""BLIP's captioner: a vision transformer, and BERT with cross-attention to its tokens.

Li et al., 2022, https://arxiv.org/abs/2201.12086. A prompt is a prefix: it begins with [DEC] too.
"""

from typing import Any

import torch
from torch import Tensor

from trainer.foreign._checkpoint import SpecialIds, Tables, Tensors
from trainer.foreign._vit import side, tower

CLASS = "BlipForConditionalGeneration"


def tables(config: Any) -> Tables:
    """Returns what ours is built from."""
    text = config.text_config
    return Tables(
        tower(config.vision_config, norm_first=False),
        {"name": "linear"},
        {"name": "bert", "architecture": text.to_dict()},
        text.max_position_embeddings,
        side(config.vision_config),
    )


def special_ids(model: Any) -> SpecialIds:
    """Returns the ids that its `generate` goes by: captions end with [SEP]."""
    text = model.config.text_config
    return SpecialIds(text.bos_token_id, text.sep_token_id, text.pad_token_id)


def generation(model: Any) -> Any:
    """Returns how it searches by default."""
    return model.text_decoder.generation_config


def tensors(model: Any) -> Tensors:
    """Returns its weights."""
    return Tensors(model.vision_model.state_dict(), {}, model.text_decoder.state_dict())


@torch.no_grad()
def logits(model: Any, images: Tensor, token_ids: Tensor) -> Tensor:
    """Returns (B, T, V)."""
    found: Tensor = model(pixel_values=images, input_ids=token_ids).logits
    return found
