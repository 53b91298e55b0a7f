"""Whose names the tensors of a file have, and what timm calls them."""

import re
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

TIMM_NAMES = "timm names"


@dataclass(frozen=True, slots=True)
class Named:
    """A state dict by timm's names, or by those that timm itself translates.

    Attributes:
        origin: Whose names the file has, in words.
        tensors: Of the encoder.
        outside: Names in the file of what is no part of an encoder, such as a text tower.
        aliases: Name for timm's name, where `tensors` has another.
    """

    origin: str
    tensors: dict[str, Tensor]
    outside: list[str] = field(default_factory=list)
    aliases: Mapping[str, str] = field(default_factory=dict)


_Rules = tuple[tuple[str, str | Callable[[re.Match[str]], str]], ...]

# ViT, DeiT, ViTMAE, DINOv2 and BEiT. Their files have `encoder.layer.N.attention.attention.query`,
# the modules of transformers 5 `layers.N.attention.q_proj`.
_TRANSFORMERS_VIT: _Rules = (
    (r"^embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
    (r"^embeddings\.position_embeddings$", "pos_embed"),
    (r"^embeddings\.distillation_token$", "dist_token"),
    (r"^embeddings\.(cls_token|mask_token|register_tokens)$", r"\1"),
    (r"^(encoder\.)?layers?\.(\d+)\.", r"blocks.\2."),
    (r"(\.attention\.attention)?\.relative_position_bias\.", ".attn."),
    (r"\.attention\.attention\.([qkv])(uery|ey|alue)\.", r".attn.\1."),
    (r"\.attention\.([qkv])_proj\.", r".attn.\1."),
    (r"\.attention\.(output\.dense|o_proj)\.", ".attn.proj."),
    (r"\.layernorm_before\.", ".norm1."),
    (r"\.layernorm_after\.", ".norm2."),
    (r"\.(intermediate\.dense|mlp\.weights_in)\.", ".mlp.fc1."),
    (r"\.(output\.dense|mlp\.weights_out)\.", ".mlp.fc2."),
    (r"\.layer_scale(\d)\.lambda1$", r".ls\1.gamma"),
    (r"\.lambda_(\d)$", r".gamma_\1"),
    (r"^layernorm\.", "norm."),
    (r"^pooler\.layernorm\.", "fc_norm."),
)

# The vision towers of CLIP, SigLIP, GIT and BLIP; BLIP's attention is named otherwise.
_TRANSFORMERS_CLIP: _Rules = (
    (r"^embeddings\.patch_embedding\.", "patch_embed.proj."),
    (r"^embeddings\.position_embedding(\.weight)?$", "pos_embed"),
    (r"^embeddings\.class_embedding$", "cls_token"),
    (r"^pre_layrnorm\.", "norm_pre."),
    (r"^encoder\.layers\.(\d+)\.", r"blocks.\1."),
    (r"\.self_attn\.([qkv])_proj\.", r".attn.\1."),
    (r"\.self_attn\.(out_proj|projection)\.", ".attn.proj."),
    (r"\.self_attn\.qkv\.", ".attn.qkv."),
    (r"\.layer_norm(\d)\.", r".norm\1."),
    (r"^post_layernorm\.", "norm."),
)

_TRANSFORMERS_RESNET: _Rules = (
    (r"^embedder\.embedder\.convolution\.", "conv1."),
    (r"^embedder\.embedder\.normalization\.", "bn1."),
    (r"^encoder\.stages\.(\d+)\.layers\.", lambda found: f"layer{int(found[1]) + 1}."),
    (r"\.layer\.(\d+)\.convolution\.", lambda found: f".conv{int(found[1]) + 1}."),
    (r"\.layer\.(\d+)\.normalization\.", lambda found: f".bn{int(found[1]) + 1}."),
    (r"\.shortcut\.convolution\.", ".downsample.0."),
    (r"\.shortcut\.normalization\.", ".downsample.1."),
)

# A name that no other library has, and how the names below the same prefix are changed.
_MARKS: dict[str, tuple[str, _Rules]] = {
    "embeddings.patch_embeddings.projection.weight": ("transformers ViT names", _TRANSFORMERS_VIT),
    "embeddings.patch_embedding.weight": ("transformers CLIP names", _TRANSFORMERS_CLIP),
    "embedder.embedder.convolution.weight": ("transformers ResNet names", _TRANSFORMERS_RESNET),
}

# timm translates these itself, for its CLIP models.
_OPEN_CLIP_MARK = "visual.conv1.weight"
_OPEN_CLIP_ALIASES = {
    "pos_embed": "visual.positional_embedding",
    "patch_embed.proj.weight": "visual.conv1.weight",
}


def recognise(found: Mapping[str, Tensor], wanted: Collection[str]) -> Named | None:
    """Returns a file's tensors by timm's names, or None where no name is known.

    What a file puts before all names of the encoder (`module.`, `backbone.`, `vit.`) is taken off.

    Args:
        found: the file's tensors by its own names.
        wanted: timm's names of the tensors that the encoder has.
    """
    prefix = _prefix(found, _OPEN_CLIP_MARK)
    if prefix is not None:
        tensors, outside = _split(found, f"{prefix}visual.")
        tensors = {f"visual.{name}": value for name, value in tensors.items()}
        return Named("open_clip names", tensors, outside, _OPEN_CLIP_ALIASES)
    for mark, (origin, rules) in _MARKS.items():
        prefix = _prefix(found, mark)
        if prefix is not None:
            tensors, outside = _split(found, prefix)
            renamed = {_rename(name, rules): value for name, value in tensors.items()}
            return Named(origin, _as_timm_keeps(renamed), outside)
    prefix = _timm_prefix(found, wanted)
    if prefix is None:
        return None
    tensors, outside = _split(found, prefix)
    return Named(f"{TIMM_NAMES} below {prefix}" if prefix else TIMM_NAMES, tensors, outside)


def _prefix(found: Mapping[str, Tensor], mark: str) -> str | None:
    marked = (name for name in found if name == mark or name.endswith(f".{mark}"))
    first = next(marked, None)
    return None if first is None else first.removesuffix(mark)


def _timm_prefix(found: Mapping[str, Tensor], wanted: Collection[str]) -> str | None:
    """Returns what stands before the most names that timm has; a teacher's rather than others'."""
    counts: Counter[str] = Counter()
    for name in found:
        parts = name.split(".")
        for start in range(len(parts)):
            if ".".join(parts[start:]) in wanted:
                counts["".join(f"{part}." for part in parts[:start])] += 1
    return max(counts, key=lambda prefix: (counts[prefix], "teacher" in prefix), default=None)


def _split(found: Mapping[str, Tensor], prefix: str) -> tuple[dict[str, Tensor], list[str]]:
    below = {k.removeprefix(prefix): v for k, v in found.items() if k.startswith(prefix)}
    return below, [name for name in found if not name.startswith(prefix)]


def _rename(name: str, rules: _Rules) -> str:
    for pattern, replacement in rules:
        name = re.sub(pattern, replacement, name)
    return name


def _as_timm_keeps(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Returns timm's shapes: one matrix for query, key and value, embeddings with a batch."""
    kept = dict(tensors)
    for name in tensors:
        if not re.search(r"\.attn\.q\.(weight|bias)$", name):
            continue
        stem, _, kind = name.rpartition(".q.")
        parts = {part: kept.pop(f"{stem}.{part}.{kind}", None) for part in "qkv"}
        if parts["k"] is None:  # BEiT's keys have no bias, and timm no joint one then
            kept |= {f"{stem}.{part}_{kind}": v for part, v in parts.items() if v is not None}
        else:
            kept[f"{stem}.qkv.{kind}"] = torch.cat([v for v in parts.values() if v is not None])
    if "cls_token" in kept:
        kept["cls_token"] = kept["cls_token"].reshape(1, 1, -1)
    if "pos_embed" in kept:
        kept["pos_embed"] = kept["pos_embed"].reshape(1, *kept["pos_embed"].shape[-2:])
    return kept
