"""The decoder in CTranslate2, in a process of its own; `ctranslate2_side.py` starts and asks it.

    python ctranslate2_worker.py ARRAYS.npz COMPUTE_TYPE THREADS

Run by the peer's Python, which has CTranslate2 and numpy and nothing of this project. The file
holds the weights, the memory and, as JSON, the shape (see `save_model`). Requests come and answers
go as lines of JSON; the first line out tells that the model is loaded.
"""

import json
import os
import sys
import tempfile
import time
from collections.abc import Mapping
from typing import Any

import ctranslate2
import numpy as np
from ctranslate2 import specs
from numpy.typing import NDArray

Floats = NDArray[np.float32]

_INNER = 8  # the width of the encoder's head and of its hidden layer: the least that is usual


def main() -> None:
    """Loads the model, then answers until stdin ends."""
    path, compute_type, threads = sys.argv[1:]
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # whatever else is printed must not stand between the answers
    with np.load(path) as stored:
        arrays = dict(stored)
    shape, memory = json.loads(str(arrays.pop("shape"))), arrays.pop("memory")
    with tempfile.TemporaryDirectory() as folder:
        save_model(arrays, memory, shape, folder)
        translator = ctranslate2.Translator(
            folder, compute_type=compute_type, inter_threads=1, intra_threads=int(threads)
        )
    images, tokens, _ = memory.shape
    words = np.arange(images * tokens).reshape(images, tokens)
    sources = [[str(word) for word in row] for row in words.tolist()]
    print(json.dumps({"compute_type": translator.compute_type}), file=answers, flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        said = _score(translator, sources, **asked) if "captions" in asked else None
        print(json.dumps(said or _decode(translator, sources, **asked)), file=answers, flush=True)


def _decode(
    translator: ctranslate2.Translator,
    sources: list[list[str]],
    places: list[int],
    batch: int,
    options: dict[str, Any],
) -> dict[str, Any]:
    """Returns the captions of the images at `places`, and the seconds inside CTranslate2."""
    found: list[list[int]] = []
    seconds = 0.0
    for start in range(0, len(places), batch):
        part = [sources[place] for place in places[start : start + batch]]
        started = time.perf_counter()
        results = translator.translate_batch(part, return_end_token=True, **options)
        seconds += time.perf_counter() - started
        found += [[int(token) for token in result.hypotheses[0]] for result in results]
    return {"ids": found, "seconds": seconds}


def _score(
    translator: ctranslate2.Translator,
    sources: list[list[str]],
    places: list[int],
    captions: list[list[int]],
) -> dict[str, Any]:
    """Returns the log-probability of every token of every caption, the end token's included."""
    targets = [[str(token) for token in ids] for ids in captions]
    scored = translator.score_batch([sources[place] for place in places], targets)
    return {"log_probs": [one.log_probs for one in scored]}


def save_model(
    weights: Mapping[str, Floats], memory: Floats, shape: Mapping[str, Any], folder: str
) -> None:
    """Writes a translation model whose source word `i * N + k` is token k of image i.

    Args:
        weights: the state of `transformers`' GPT-2 with cross-attention.
        memory: (n, N, D), what the captions of n images attend to.
        shape: `layers`, `heads`, `bos`, `eos` and `epsilon`.
        folder: where to.
    """
    spec = specs.TransformerSpec(_encoder(memory), _decoder(weights, shape))
    config = spec.config
    config.layer_norm_epsilon = shape["epsilon"]
    config.bos_token = config.decoder_start_token = str(shape["bos"])
    config.eos_token, config.unk_token = str(shape["eos"]), "0"
    words, vocabulary = memory.shape[0] * memory.shape[1], len(weights["transformer.wte.weight"])
    spec.register_source_vocabulary([str(word) for word in range(words)])
    spec.register_target_vocabulary([str(word) for word in range(vocabulary)])
    spec.validate()
    spec.optimize()
    spec.save(folder)


def _encoder(memory: Floats) -> specs.TransformerEncoderSpec:
    """Returns an encoder that looks the memory up and adds zeros to it.

    CTranslate2 wants one layer at least: this one is as narrow as can be. In int8 the table is
    rounded as the projection to keys and values would round its input, row by row: nothing is lost
    twice.
    """
    _, tokens, width = memory.shape
    encoder = specs.TransformerEncoderSpec(1, 1, no_final_norm=True, head_dim=_INNER)
    encoder.scale_embeddings = False
    encoder.embeddings[0].weight = memory.reshape(-1, width)
    encoder.position_encodings.encodings = np.zeros((tokens, width), np.float32)
    (layer,) = encoder.layer
    attention, ffn = layer.self_attention, layer.ffn
    for norm in (attention.layer_norm, ffn.layer_norm):
        norm.gamma, norm.beta = np.ones(width, np.float32), np.zeros(width, np.float32)
    for linear, shape in (
        (attention.linear[0], (3 * _INNER, width)),
        (attention.linear[1], (width, _INNER)),
        (ffn.linear_0, (_INNER, width)),
        (ffn.linear_1, (width, _INNER)),
    ):
        linear.weight, linear.bias = np.zeros(shape, np.float32), np.zeros(shape[0], np.float32)
    return encoder


def _decoder(
    weights: Mapping[str, Floats], shape: Mapping[str, Any]
) -> specs.TransformerDecoderSpec:
    """Returns GPT-2 with cross-attention; `transformers` keeps its matrices (D_in, D_out)."""
    decoder = specs.TransformerDecoderSpec(
        shape["layers"], shape["heads"], activation=specs.Activation.GELUTanh
    )
    decoder.scale_embeddings = False
    decoder.embeddings.weight = weights["transformer.wte.weight"]
    decoder.position_encodings.encodings = weights["transformer.wpe.weight"]
    decoder.projection.weight = weights["lm_head.weight"]
    _set_norm(decoder.layer_norm, weights, "transformer.ln_f")
    for number, layer in enumerate(decoder.layer):
        block = f"transformer.h.{number}"
        own, image, ffn = layer.self_attention, layer.attention, layer.ffn
        _set_norm(own.layer_norm, weights, f"{block}.ln_1")
        _set_norm(image.layer_norm, weights, f"{block}.ln_cross_attn")
        _set_norm(ffn.layer_norm, weights, f"{block}.ln_2")
        for linear, name in (
            (own.linear[0], "attn.c_attn"),
            (own.linear[1], "attn.c_proj"),
            (image.linear[0], "crossattention.q_attn"),
            (image.linear[1], "crossattention.c_attn"),
            (image.linear[2], "crossattention.c_proj"),
            (ffn.linear_0, "mlp.c_fc"),
            (ffn.linear_1, "mlp.c_proj"),
        ):
            linear.weight = np.ascontiguousarray(weights[f"{block}.{name}.weight"].T)
            linear.bias = weights[f"{block}.{name}.bias"]
    return decoder


def _set_norm(norm: Any, weights: Mapping[str, Floats], name: str) -> None:
    norm.gamma, norm.beta = weights[f"{name}.weight"], weights[f"{name}.bias"]


if __name__ == "__main__":
    main()
