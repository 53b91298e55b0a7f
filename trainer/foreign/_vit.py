"""The vision towers of these captioners: plain vision transformers, as timm has them."""

from typing import Any

from trainer.errors import CheckpointError

_MODELS = {
    (False, "gelu"): "vit_base_patch16_224",
    (True, "gelu"): "vit_base_patch16_clip_224",
    (True, "quick_gelu"): "vit_base_patch16_clip_quickgelu_224",
}


def tower(config: Any, *, norm_first: bool, qkv_bias: bool = True) -> dict[str, Any]:
    """Returns the `[encoder]` table of a tower.

    Args:
        config: the tower's own.
        norm_first: whether embeddings are normalised before the first layer, as CLIP's are.
        qkv_bias: of queries, keys and values.

    Raises:
        CheckpointError: an activation that no such model of timm has.
    """
    model = _MODELS.get((norm_first, config.hidden_act))
    if model is None:
        raise CheckpointError(
            f"vision_config: hidden_act {config.hidden_act!r}; gelu is supported, and with CLIP's "
            "towers quick_gelu"
        )
    if not isinstance(config.patch_size, int):
        raise CheckpointError(f"vision_config: patch_size {config.patch_size}; squares are needed")
    return {
        "name": "timm_vit",
        "model": model,
        "patch_size": config.patch_size,
        "embed_dim": config.hidden_size,
        "depth": config.num_hidden_layers,
        "num_heads": config.num_attention_heads,
        "mlp_ratio": config.intermediate_size / config.hidden_size,
        "qkv_bias": qkv_bias,
        "norm_eps": config.layer_norm_eps,
    }


def side(config: Any) -> tuple[int, int]:
    """Returns the height and width of the images that a tower takes."""
    size = config.image_size
    return (size, size) if isinstance(size, int) else (size[0], size[1])
