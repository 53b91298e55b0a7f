"""Decoders that begin with a checkpoint of `transformers`: what they say, and what is refused."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from foreign_checkpoints import byte_pairs, word_pieces
from tiny_captioner import VIT
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from exports.images import ImageSpec
from exports.manifest import Generation
from trainer.captioner import Captioner
from trainer.decoders._pretrained import read_text
from trainer.decoding import TorchSteps
from trainer.errors import CheckpointError, ConfigError, DataError
from trainer.graphs import export_decoder, export_encoder
from trainer.onnx_steps import OnnxSteps
from trainer.parity import compare
from trainer.run import Run
from trainer.stages import finetune

IMAGE = ImageSpec(height=32, width=48)
CAPTIONS = ["a cat sits on a table"]
SEEN = "cross_attention"


def gpt2(vocabulary: int, end: int, **more: Any) -> Any:
    sizes = {"n_positions": 20, "n_embd": 24, "n_layer": 3, "n_head": 2, "n_inner": 40}
    ids = {"bos_token_id": end, "eos_token_id": end}
    return GPT2LMHeadModel(GPT2Config(vocab_size=vocabulary, **sizes, **ids, **more))


def llama(vocabulary: int, end: int, **more: Any) -> Any:
    """Heads wider than D / H that share keys, another rotation, untied, with biases."""
    sizes = {
        "hidden_size": 24,
        "intermediate_size": 40,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 64,
        "tie_word_embeddings": False,
        "attention_bias": True,
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 500.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 16,
        },
        "bos_token_id": end,
        "eos_token_id": end,
    }
    return LlamaForCausalLM(LlamaConfig(vocab_size=vocabulary, **{**sizes, **more}))


def bart(vocabulary: int, end: int) -> Any:
    sizes = {
        "d_model": 24,
        "encoder_layers": 1,
        "decoder_layers": 2,
        "encoder_attention_heads": 2,
        "decoder_attention_heads": 2,
        "encoder_ffn_dim": 32,
        "decoder_ffn_dim": 40,
        "max_position_embeddings": 20,
        "scale_embedding": True,
        "activation_function": "relu",
    }
    ids = {"decoder_start_token_id": end, "eos_token_id": end, "pad_token_id": 1}
    return BartForConditionalGeneration(BartConfig(vocab_size=vocabulary, **sizes, **ids))


def t5(vocabulary: int, end: int, **more: Any) -> Any:
    sizes = {"d_model": 24, "d_kv": 8, "d_ff": 40, "num_layers": 1, "num_decoder_layers": 2}
    ids = {"decoder_start_token_id": 0, "eos_token_id": end, "pad_token_id": 0}
    return T5ForConditionalGeneration(
        T5Config(vocab_size=vocabulary, num_heads=4, **sizes, **ids, **more)
    )


def t5_untied(vocabulary: int, end: int) -> Any:
    """Version 1.1: gated layers, and a head of its own."""
    made = t5(vocabulary, end, feed_forward_proj="gated-gelu", tie_word_embeddings=False)
    made.lm_head.weight = torch.nn.Parameter(torch.randn(vocabulary, 24))
    return made


def saved(folder: Path, made: Any, **more: Any) -> Any:
    """Writes a checkpoint with a tokenizer; its vocabulary is padded, as T5's is."""
    torch.manual_seed(0)
    tokenizer = byte_pairs()
    model = made(len(tokenizer) + 3, tokenizer.eos_token_id, **more)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.2)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    if made is t5_untied:  # the library would say that it is tied
        path = folder / "config.json"
        told = json.loads(path.read_text()) | {"tie_word_embeddings": False}
        path.write_text(json.dumps(told))
    return model.eval()


def captioner(name: str, folder: Path, bridge: dict[str, Any] | None = None, **more: Any) -> Any:
    _, text, _ = read_text(str(folder), CAPTIONS, max_length=10)
    decoder = {"name": name, "weights": str(folder), "max_length": 10, **more}
    return Captioner(
        encoder=VIT,
        bridge=bridge or {"name": SEEN, "layers": 0},
        decoder=decoder,
        image=IMAGE,
        text=text,
    ).eval()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "made", "bridge"),
    [
        ("llama", llama, {"name": "perceiver", "latents": 2, "layers": 1, "heads": 2}),
        ("llama", llama, {"name": "prefix", "length": 3}),
        ("bart", bart, None),
        ("t5", t5, None),
    ],
)
def test_sizes_of_their_own_export(name: str, made: Any, bridge: Any, tmp_path: Path) -> None:
    saved(tmp_path, made)
    ours = captioner(name, tmp_path, bridge)
    for gated in ours.decoder.gated:
        gated.attention_gate.data.fill_(0.5)
    encoder, encoder_spec = export_encoder(ours)
    decoder, decoder_spec = export_decoder(ours)
    steps = OnnxSteps(encoder, decoder, encoder_spec, decoder_spec, ours.text)
    pixels = np.random.default_rng(0).integers(0, 256, (8, 32, 48, 3), np.uint8)
    generation = Generation(num_beams=3, max_new_tokens=8)
    compare(TorchSteps(ours), steps, pixels, generation).check()


def draw(model: Any) -> torch.Tensor:
    return torch.randint(
        model.config.vocab_size, (2, 9), generator=torch.Generator().manual_seed(1)
    )


@pytest.mark.parametrize("made", [gpt2, llama])
def test_a_gated_language_model_says_at_first_what_it_said(made: Any, tmp_path: Path) -> None:
    model = saved(tmp_path, made)
    bridge = {"name": "perceiver", "latents": 2, "layers": 1, "heads": 2}
    ours = captioner(made.__name__, tmp_path, bridge)
    token_ids = draw(model)
    with torch.no_grad():
        found = ours(torch.zeros(2, 3, 32, 48), token_ids)
        torch.testing.assert_close(found, model(token_ids).logits, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(("name", "made"), [("bart", bart), ("t5", t5), ("t5", t5_untied)])
def test_a_decoder_says_of_an_encoding_what_it_said(name: str, made: Any, tmp_path: Path) -> None:
    model = saved(tmp_path, made)
    ours = captioner(name, tmp_path)
    token_ids, encoding = draw(model), torch.randn(2, 5, 24)
    with torch.no_grad():
        found = ours.decoder(token_ids, ours.decoder.memory(encoding))
        theirs = model(encoder_outputs=(encoding,), decoder_input_ids=token_ids).logits
    torch.testing.assert_close(found, theirs, atol=1e-4, rtol=1e-4)


def test_cross_attention_is_new_and_the_rest_of_gpt2_is_not(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = saved(tmp_path, gpt2)
    ours = captioner("gpt2", tmp_path).decoder.model.state_dict()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, ours[name])
    told = capsys.readouterr().out.splitlines()
    assert told == [
        f"{tmp_path}: loaded 41 of 65 tensors; new: 24 (first "
        "transformer.h.0.crossattention.c_attn.bias)"
    ]


def test_prefixes_take_positions(tmp_path: Path) -> None:
    saved(tmp_path, gpt2)
    bridge = {"name": "prefix", "length": 5}
    assert captioner("gpt2", tmp_path, bridge).decoder.memory(torch.zeros(1, 5, 24)).prefix
    with pytest.raises(ConfigError, match=r"max_length = 10, but .* has 8 positions for text"):
        captioner("gpt2", tmp_path, {**bridge, "length": 12})


@pytest.mark.parametrize(
    ("made", "start", "pad"), [(gpt2, "end", "end"), (bart, "end", "end"), (t5, 0, "end")]
)
def test_the_tokenizer_comes_with_its_special_ids(
    made: Any, start: Any, pad: Any, tmp_path: Path
) -> None:
    model = saved(tmp_path, made)
    end = byte_pairs().eos_token_id
    body, text, architecture = read_text(str(tmp_path), CAPTIONS, max_length=10)
    assert text.eos_id == end
    assert text.bos_id == (end if start == "end" else start)
    assert text.pad_id == end
    assert text.vocab_size == model.config.vocab_size
    assert json.loads(body)["model"]["type"] == "BPE"
    assert architecture["model_type"] == model.config.model_type


def test_what_will_not_do_is_refused_in_a_line(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="none: "):
        read_text(str(tmp_path / "none"), CAPTIONS, max_length=9)
    saved(tmp_path, gpt2)
    with pytest.raises(ConfigError, match="a checkpoint of 'gpt2', but the decoder is 'llama'"):
        captioner("llama", tmp_path)
    with pytest.raises(ConfigError, match="leave width out: weights has sizes of its own"):
        captioner("gpt2", tmp_path, width=24)
    with pytest.raises(ConfigError, match="bert begins at random"):
        captioner("bert", tmp_path)
    word_pieces().save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="the tokenizer has no end token"):
        read_text(str(tmp_path), CAPTIONS, max_length=9)
    pieces = word_pieces()
    pieces.eos_token = "[SEP]"
    pieces.save_pretrained(tmp_path)
    with pytest.raises(DataError, match="cannot spell 'Ω' in the caption 'the Ω sea'"):
        read_text(str(tmp_path), ["a red ball", "the Ω sea"], max_length=9)


def test_weights_of_another_shape_or_without_a_layer_are_refused(tmp_path: Path) -> None:
    saved(tmp_path, gpt2)
    path = tmp_path / "config.json"
    told = json.loads(path.read_text())
    path.write_text(json.dumps(told | {"n_layer": 4}))
    with pytest.raises(CheckpointError, match=r"12 of 85 tensors missing \(first transformer.h.3"):
        captioner("gpt2", tmp_path)
    path.write_text(json.dumps(told | {"n_inner": 32}))
    with pytest.raises(CheckpointError, match=r"9 of 65 tensors of another shape .*found \(40"):
        captioner("gpt2", tmp_path)
    path.write_text(json.dumps(told | {"vocab_size": 200}))
    with pytest.raises(ConfigError, match=r"has the id 28\d, but the model embeds 200 tokens"):
        read_text(str(tmp_path), CAPTIONS, max_length=9)


def recipe(shapes: Path, folder: Path, **more: Any) -> finetune.Config:
    table = {
        "data": {"train": shapes / "captions_train.json", "captions_per_image": 1},
        "image": {"height": 32, "width": 32},
        "encoder": VIT,
        "bridge": {"name": SEEN, "layers": 0},
        "decoder": {"name": "gpt2", "weights": str(folder), "max_length": 16},
        "objective": {"name": "lm"},
        "loop": {"epochs": 1, "batch_size": 8, "workers": 0},
    }
    return finetune.Config.model_validate(table | more)


def test_a_run_needs_its_checkpoint_only_once(shapes: Path, tmp_path: Path) -> None:
    folder = tmp_path / "gpt2"
    saved(folder, gpt2)
    first = recipe(shapes, folder)
    finetune.run(first, tmp_path / "run")
    shutil.rmtree(folder)
    run = Run(tmp_path / "run")
    assert run.text.bos_id == run.text.eos_id == byte_pairs().eos_token_id
    trained = run.captioner().decoder
    assert (trained.layers, trained.width) == (3, 24)
    longer = first.model_copy(update={"loop": first.loop.model_copy(update={"epochs": 2})})
    with pytest.raises(CheckpointError, match="holds a run of another recipe"):
        finetune.run(longer, tmp_path / "run")
    finetune.run(first, tmp_path / "run")  # nothing is left to do, and nothing to read
    second = recipe(shapes, folder, start=tmp_path / "run")
    finetune.run(second, tmp_path / "second")
    assert Run(tmp_path / "second").captioner().decoder.layers == 3
