"""The tables of a tiny captioner."""

from exports.text import TextSpec

TEXT = TextSpec(vocab_size=40, pad_id=0, bos_id=1, eos_id=2, max_length=12)
CNN = {"name": "timm_cnn", "model": "tf_efficientnet_lite0"}
VIT = {
    "name": "timm_vit",
    "model": "vit_tiny_patch16_224",
    "patch_size": 16,
    "embed_dim": 32,
    "depth": 2,
    "num_heads": 2,
}
GPT2 = {"name": "gpt2", "width": 32, "layers": 2, "heads": 2, "dropout": 0.0, "max_length": 12}
BRIDGES = {
    "concat": {},
    "cross_attention": {"layers": 1, "heads": 2, "dropout": 0.0},
    "linear": {},
    "perceiver": {"latents": 4, "layers": 1, "heads": 2},
    "prefix": {"length": 3},
}


def decoder_table(name: str) -> dict[str, object]:
    """Returns `[decoder]` of a family; all have the same keys."""
    return {**GPT2, "name": name, "heads": 4}


def bridge_table(name: str) -> dict[str, object]:
    """Returns `[bridge]`."""
    return {"name": name, **BRIDGES[name]}
