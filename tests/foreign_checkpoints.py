"""Tiny captioners of `transformers` with random weights, as `save_pretrained` writes them."""

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import (
    BlipConfig,
    BlipForConditionalGeneration,
    BlipImageProcessor,
    CLIPImageProcessor,
    GitConfig,
    GitForCausalLM,
    GPT2Config,
    PreTrainedTokenizerFast,
    VisionEncoderDecoderConfig,
    VisionEncoderDecoderModel,
    ViTConfig,
    ViTImageProcessor,
)

CAPTIONS = ["a cat sits on a table", "two dogs run through the grass", "a red ball", "the sea"]
SIDE = 48


def word_pieces() -> PreTrainedTokenizerFast:
    """A tokenizer as BERT's; [PAD] is 0, [CLS] 2, [SEP] 3."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    specials = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    tokenizer.train_from_iterator(
        CAPTIONS, trainers.WordPieceTrainer(vocab_size=60, special_tokens=specials)
    )
    names = dict(zip(("pad_token", "unk_token", "cls_token", "sep_token"), specials, strict=True))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)


def byte_pairs() -> PreTrainedTokenizerFast:
    """A tokenizer as GPT-2's, whose only special token is the last one."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=280, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(CAPTIONS, trainer)
    end = "<|endoftext|>"
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=end, eos_token=end, unk_token=end
    )


def vision_encoder_decoder(folder: Path, *, width: int = 24) -> Any:
    """ViT of width 32 and GPT-2."""
    tokenizer = byte_pairs()
    end = tokenizer.eos_token_id
    encoder = ViTConfig(**_tower(), hidden_act="gelu")
    decoder = GPT2Config(
        vocab_size=len(tokenizer),
        n_positions=32,
        n_embd=width,
        n_layer=2,
        n_head=2,
        add_cross_attention=True,
        bos_token_id=end,
        eos_token_id=end,
    )
    config = VisionEncoderDecoderConfig.from_encoder_decoder_configs(encoder, decoder)
    config.decoder_start_token_id, config.pad_token_id, config.eos_token_id = end, end, end
    model = VisionEncoderDecoderModel(config)
    model.generation_config.decoder_start_token_id = end
    model.generation_config.eos_token_id = model.generation_config.pad_token_id = end
    processor = ViTImageProcessor(size={"height": SIDE, "width": SIDE})
    return _saved(folder, model, model.decoder, tokenizer, processor)


def blip(folder: Path) -> Any:
    """ViT of width 32, BERT of width 24."""
    tokenizer = word_pieces()
    config = BlipConfig(
        text_config={
            "vocab_size": len(tokenizer) + 2,  # [DEC] and [ENC], which the tokenizer lacks
            "hidden_size": 24,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "intermediate_size": 40,
            "max_position_embeddings": 32,
            "bos_token_id": len(tokenizer),
            "eos_token_id": 3,
            "sep_token_id": 3,
            "pad_token_id": 0,
        },
        vision_config=_tower(),
    )
    model = BlipForConditionalGeneration(config)
    processor = BlipImageProcessor(size={"height": SIDE, "width": SIDE})
    return _saved(folder, model, model.text_decoder, tokenizer, processor)


def git(folder: Path) -> Any:
    """CLIP's ViT of width 32, text of width 24."""
    tokenizer = word_pieces()
    config = GitConfig(
        vision_config=_tower(),
        vocab_size=len(tokenizer),
        hidden_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=40,
        max_position_embeddings=32,
        bos_token_id=2,
        eos_token_id=3,
        pad_token_id=0,
    )
    model = GitForCausalLM(config)
    processor = CLIPImageProcessor(
        size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE}
    )
    return _saved(folder, model, model, tokenizer, processor)


def _tower() -> dict[str, Any]:
    return {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 56,
        "image_size": SIDE,
        "patch_size": 16,
    }


def _saved(folder: Path, model: Any, decoder: Any, tokenizer: Any, processor: Any) -> Any:
    """Writes everything; weights are made larger first, so that captions differ and some end."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.25)
            elif "norm" not in name.lower() and "ln_" not in name:
                parameter.normal_(std=0.1)
        head = decoder.get_output_embeddings()
        if getattr(head, "bias", None) is not None:
            head.bias[3] += 2
        else:
            head.weight[tokenizer.eos_token_id] *= 3
    for part in (model, tokenizer, processor):
        part.save_pretrained(folder)
    return model.eval()
