"""CLIP of `transformers`: both towers, the projections, the tokenizer.

Radford et al., 2021, https://arxiv.org/abs/2103.00020.
"""

import re
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from torch import Tensor

from exports.text import TextSpec
from trainer.decoders._pretrained import quiet
from trainer.errors import CheckpointError
from trainer.foreign._checkpoint import load_model, load_pixels, load_tokenizer
from trainer.foreign._pixels import Pixels
from trainer.foreign._vit import side, tower

_CLASS = "CLIPModel"
_TEXT_NAMES = (
    (r"^embeddings\.token_embedding\.", "token_embedding."),
    (r"^embeddings\.position_embedding\.weight$", "position"),
    (r"^encoder\.layers\.(\d+)\.", r"blocks.layers.\1."),
    (r"\.layer_norm(\d)\.", r".norm\1."),
    (r"\.mlp\.fc(\d)\.", r".linear\1."),
    (r"^final_layer_norm\.", "norm."),
)
_ACTIVATIONS = ("gelu", "quick_gelu")


class Clip(NamedTuple):
    """What `save_pretrained` left.

    Attributes:
        encoder: The `[encoder]` table of its image tower, normalisation included.
        method: The `[method]` table of the rest.
        pixels: How its images are prepared.
        text: Its special ids.
        tokenizer_json: Its tokenizer.
        vision: The image tower by its own names.
        rest: All other weights, by the names of `trainer.methods.clip`.
    """

    encoder: dict[str, Any]
    method: dict[str, Any]
    pixels: Pixels
    text: TextSpec
    tokenizer_json: bytes
    vision: dict[str, Tensor]
    rest: dict[str, Tensor]


def read_clip(source: str | Path) -> Clip:
    """Returns a CLIP of a folder, or of that name on the hub.

    Raises:
        CheckpointError: there is none, a file of it is missing or damaged, or it is built in a way
            that our towers are not.
    """
    with quiet():
        config = _config(source)
        table = tower(config.vision_config, norm_first=True)
        model = load_model(source, _CLASS)
        tokenizer = load_tokenizer(source)
        pixels = load_pixels(source, side(config.vision_config))
    return Clip(
        encoder={**table, "mean": pixels.mean, "std": pixels.std},
        method=_method(source, config),
        pixels=pixels,
        text=_text(source, config.text_config, tokenizer),
        tokenizer_json=tokenizer.backend_tokenizer.to_str().encode(),
        vision=model.vision_model.state_dict(),
        rest={
            **_text_tower(model.text_model.state_dict()),
            "image_projection.weight": model.visual_projection.weight.detach(),
            "text_projection.weight": model.text_projection.weight.detach(),
            "logit_scale": model.logit_scale.detach(),
        },
    )


def _config(source: str | Path) -> Any:
    try:
        config = transformers.AutoConfig.from_pretrained(source)
    except (OSError, ValueError) as error:
        line = str(error).strip().partition("\n")[0]
        raise CheckpointError(f"{source}: no {_CLASS} of transformers: {line}") from error
    if config.model_type != "clip":
        raise CheckpointError(
            f"{source}: a checkpoint of {config.model_type!r}, but a {_CLASS} is needed"
        )
    return config


def _method(source: str | Path, config: Any) -> dict[str, Any]:
    text = config.text_config
    if text.hidden_act not in _ACTIVATIONS:
        raise CheckpointError(
            f"{source}: text_config: hidden_act {text.hidden_act!r}; {' and '.join(_ACTIVATIONS)} "
            "are supported"
        )
    return {
        "name": "clip",
        "width": config.projection_dim,
        "text": {
            "width": text.hidden_size,
            "layers": text.num_hidden_layers,
            "heads": text.num_attention_heads,
            "mlp_width": text.intermediate_size,
            "activation": text.hidden_act,
            "norm_eps": text.layer_norm_eps,
        },
    }


def _text(source: str | Path, config: Any, tokenizer: Any) -> TextSpec:
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    if bos is None or eos is None:
        raise CheckpointError(
            f"{source}: the tokenizer begins captions with {bos} and ends them with {eos}, but an "
            "id is needed for each; set bos_token and eos_token and save it again"
        )
    largest = max(tokenizer.backend_tokenizer.get_vocab(with_added_tokens=True).values())
    if largest >= config.vocab_size:
        raise CheckpointError(
            f"{source}: the tokenizer has the id {largest}, but the model embeds "
            f"{config.vocab_size} tokens; save the tokenizer of these weights beside them"
        )
    pad = eos if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    return TextSpec(
        vocab_size=config.vocab_size,
        bos_id=bos,
        eos_id=eos,
        pad_id=pad,
        max_length=config.max_position_embeddings,
    )


def _text_tower(theirs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Returns the text tower by our names; PyTorch keeps query, key and value in one matrix."""
    ours: dict[str, Tensor] = {}
    for name, value in theirs.items():
        if name == "embeddings.position_ids" or re.search(r"\.[kv]_proj\.", name):
            continue
        renamed = name
        for pattern, replacement in _TEXT_NAMES:
            renamed = re.sub(pattern, replacement, renamed)
        if ".q_proj." in name:
            parts = [theirs[name.replace(".q_proj.", f".{part}_proj.")] for part in "qkv"]
            renamed = renamed.replace(".q_proj.", ".in_proj_")
            value = torch.cat(parts)
        ours[f"text_encoder.{renamed}"] = value
    return ours
