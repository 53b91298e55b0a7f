"""GIT: CLIP's vision transformer, and BERT's layers over its tokens and the text behind them.

Wang et al., 2022, https://arxiv.org/abs/2205.14100. Image tokens see each other and no text; the
text's positions begin at 0.
"""

from typing import Any

import torch
from torch import Tensor

from trainer.errors import CheckpointError
from trainer.foreign._checkpoint import SpecialIds, Tables, Tensors
from trainer.foreign._vit import side, tower

CLASS = "GitForCausalLM"
_SHARED = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
    "hidden_act",
    "max_position_embeddings",
    "layer_norm_eps",
)


def tables(config: Any) -> Tables:
    """Returns what ours is built from.

    Raises:
        CheckpointError: it takes several images.
    """
    if config.num_image_with_embedding is not None:
        raise CheckpointError(
            f"num_image_with_embedding = {config.num_image_with_embedding}: a captioner of videos; "
            "those of one image are supported"
        )
    shared = {name: getattr(config, name) for name in _SHARED}
    # Of the width of the text: without cross-attention no other is needed.
    text = {**shared, "model_type": "blip_text_model", "encoder_hidden_size": config.hidden_size}
    bridge = {"name": "concat", "positions": False}
    return Tables(
        tower(config.vision_config, norm_first=True),
        {**bridge, "norm_eps": config.vision_config.layer_norm_eps},
        {"name": "bert", "plain_head": True, "architecture": text},
        config.max_position_embeddings,
        side(config.vision_config),
    )


def special_ids(model: Any) -> SpecialIds:
    """Returns the ids that its `generate` goes by: captions begin with [CLS], end with [SEP]."""
    chosen = model.generation_config
    return SpecialIds(chosen.bos_token_id, chosen.eos_token_id, chosen.pad_token_id)


def generation(model: Any) -> Any:
    """Returns how it searches by default."""
    return model.generation_config


def tensors(model: Any) -> Tensors:
    """Returns its weights."""
    projection = model.git.visual_projection.visual_projection.state_dict()
    names = {"0": "project", "1": "norm"}
    return Tensors(
        model.git.image_encoder.state_dict(),
        {f"{names[name[0]]}{name[1:]}": value for name, value in projection.items()},
        {
            **model.git.embeddings.state_dict(prefix="bert.embeddings."),
            **model.git.encoder.state_dict(prefix="bert.encoder."),
            **model.output.state_dict(prefix="cls."),
        },
    )


@torch.no_grad()
def logits(model: Any, images: Tensor, token_ids: Tensor) -> Tensor:
    """Returns (B, T, V)."""
    found: Tensor = model(pixel_values=images, input_ids=token_ids).logits
    return found[:, -token_ids.shape[1] :]
