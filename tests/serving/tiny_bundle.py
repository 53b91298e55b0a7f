"""A captioner small enough to build by hand: real graphs, real tokenizer, random weights.

Its log-probabilities depend on the image, on the position and, through the caches, on every token
so far, so a wrong gather or a mixed-up image changes the captions. An all-black image makes its
numbers NaN: the poisoned member of a batch. No PyTorch anywhere.
"""

from io import BytesIO
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from PIL import Image
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

from exports.bundle import write_bundle
from exports.images import ImageSpec, preprocess
from exports.manifest import (
    DecoderSpec,
    EncoderSpec,
    Generation,
    Golden,
    Manifest,
    MatcherSpec,
    Reranking,
    encoded_name,
    next_name,
)
from exports.reference import REFERENCE_FILE, Reference, features_of
from exports.text import TextSpec
from exports.text import Tokenizer as Text
from serving.beam import beam_search
from serving.group import BeamParams
from serving.session import Graphs, OnnxSession

SPECIALS = ["<pad>", "<bos>", "<eos>", "<unk>"]
_TEXT = """
a the one two three some red blue green brown black white small big old young dog cat horse bird
man woman child boat ball tree house river street field beach hill sits stands runs jumps swims
sleeps walks plays looks waits on in under near behind above with and of at
"""
WORDS = _TEXT.split()
V = len(SPECIALS) + len(WORDS)
L, HEADS, HEAD_DIM = 2, 2, 8
D = HEADS * HEAD_DIM
SIDE, PATCH = 32, 16
N = (SIDE // PATCH) ** 2
TEXT = TextSpec(vocab_size=V, bos_id=1, eos_id=2, pad_id=0, max_length=20)
CACHE = tuple(f"cache_{kind}.{layer}" for layer in range(L) for kind in "kv")
EMBEDDING, E = "image_embedding", 6
MEMORY = tuple(f"memory_{kind}.{layer}" for layer in range(L) for kind in "kv")


def picture(seed, *, size=(64, 48), format="PNG", **save):  # noqa: A002 - Pillow's own word
    """Returns the bytes of an image file: a random smooth pattern."""
    coarse = np.random.default_rng(seed).integers(1, 256, (4, 4, 3), dtype=np.uint8)
    body = BytesIO()
    Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC).save(body, format, **save)
    return body.getvalue()


def black_picture():
    """Returns the bytes of the image that the tiny captioner cannot caption."""
    body = BytesIO()
    Image.new("RGB", (64, 48)).save(body, "PNG")
    return body.getvalue()


MATCHER = MatcherSpec(
    memory=MEMORY[2:], reranking=Reranking(temperature=0.1, itm_weight=0.25, clip_weight=0.5)
)


def write_tiny_bundle(
    target: Path,
    *,
    name="tiny",
    version="1",
    seed=0,
    broken_golden=False,
    nan=False,
    matcher=False,
    broken_match=False,
    reference="",
) -> Path:
    """Writes a bundle to `target`; another `seed` gives other captions.

    `broken_golden` promises captions that the graphs do not give; `nan` puts a NaN into the
    weights. Both pass every check of the files and must fail the check of the captions. With
    `matcher` the bundle also tells how well captions fit; `broken_match` promises another number.
    `reference` names the encoder's output by which it tells how far an image is from `picture`s.
    """
    encoder, decoder = _encoder(seed, embedding=matcher), _decoder(seed)
    tokenizer = _tokenizer()
    images = {f"golden/{index}.png": picture(1000 + index) for index in range(3)}
    manifest = Manifest(
        name=name,
        version=version,
        created="2026-01-01T00:00:00Z",
        description="A tiny captioner for tests.",
        licence="Apache-2.0",
        image=ImageSpec(height=SIDE, width=SIDE),
        text=TEXT,
        encoder=EncoderSpec(outputs=(*MEMORY, EMBEDDING) if matcher else MEMORY),
        decoder=DecoderSpec(layers=L, heads=HEADS, head_dim=HEAD_DIM, memory=MEMORY, cache=CACHE),
        matcher=MATCHER if matcher else None,
        defaults=Generation(max_new_tokens=12),
        metrics={"CIDEr-D": 0.0},
    )
    graphs = Graphs(encoder, decoder, _join(), _matcher(seed) if matcher else None)
    golden = _golden(graphs, manifest, images, Text(tokenizer, TEXT))
    if broken_match:
        golden[1] = golden[1].model_copy(update={"match": 1 - golden[1].match})
    if broken_golden:
        golden[1] = golden[1].model_copy(update={"token_ids": (5, 6, 7, TEXT.eos_id)})
    files = {
        "encoder.onnx": encoder,
        "decoder.onnx": _decoder(seed, nan=True) if nan else decoder,
        "join.onnx": _join(),
        "tokenizer.json": tokenizer,
        **({"matcher.onnx": graphs.matcher} if matcher else {}),
        **images,
    }
    if reference:
        files[REFERENCE_FILE] = _reference(graphs, manifest, reference).to_json()
    write_bundle(target, manifest.model_copy(update={"golden": tuple(golden)}), files)
    return target


def _golden(graphs, manifest, images, text):
    session = OnnxSession(graphs, manifest, threads=1)
    pixels = [preprocess(Image.open(BytesIO(body)), manifest.image) for body in images.values()]
    params = BeamParams(**manifest.defaults.model_dump())
    decoding = session.decoding(len(pixels))
    memory = session.encode(np.stack(pixels))
    decoding.place(memory, *[range(len(pixels))] * 2)
    found = beam_search(decoding, [params] * len(pixels))

    def fits(at, best):
        if session.matcher is None:
            return {}
        return session.matcher.match(memory, at, [best.token_ids])[0]._asdict()

    return [
        Golden(
            image=name,
            token_ids=best.token_ids,
            text=text.decode(best.token_ids),
            score=best.score,
            **fits(at, best),
        )
        for at, (name, [best]) in enumerate(zip(images, found, strict=True))
    ]


def _reference(graphs, manifest, output):
    session = OnnxSession(graphs, manifest, threads=1)
    bodies = [picture(2000 + index) for index in range(64)]
    pixels = [preprocess(Image.open(BytesIO(body)), manifest.image) for body in bodies]
    memory = session.encode(np.stack(pixels))
    values = memory.values[MEMORY.index(output)].numpy()
    return Reference.fit(output, features_of(values))


def _tokenizer():
    vocabulary = {word: index for index, word in enumerate([*SPECIALS, *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.decoder = decoders.WordPiece(prefix="##", cleanup=False)
    tokenizer.add_special_tokens(SPECIALS[:3])
    return tokenizer.to_str().encode()


class _Graph:
    """Collects nodes and weights; every method returns the name of the tensor it made."""

    def __init__(self):
        self.nodes = []
        self.weights = []

    def op(self, kind, *inputs, output=None, **attributes):
        output = output or f"t{len(self.nodes)}"
        self.nodes.append(helper.make_node(kind, inputs, [output], **attributes))
        return output

    def const(self, value, dtype=np.float32):
        name = f"w{len(self.weights)}"
        self.weights.append(numpy_helper.from_array(np.array(value, dtype=dtype), name))
        return name

    def shape(self, *dims):
        return self.const(dims, np.int64)

    def finish(self, inputs, outputs):
        graph = helper.make_graph(self.nodes, "tiny", inputs, outputs, self.weights)
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
        onnx.checker.check_model(model)
        return model.SerializeToString()


def _floats(names, dims):
    return [helper.make_tensor_value_info(name, TensorProto.FLOAT, dims) for name in names]


def _ints(name, dims):
    return helper.make_tensor_value_info(name, TensorProto.INT64, dims)


def _encoder(seed, *, embedding=False):
    rng = np.random.default_rng([seed, 0])
    g = _Graph()
    pixels = g.op("Cast", "images", to=TensorProto.FLOAT)
    total = g.op("ReduceSum", pixels, g.shape(1, 2, 3), keepdims=1)
    one = g.op("Div", total, total)  # NaN for an all-black image, 1 for any other
    scaled = g.op("Sub", g.op("Div", pixels, g.const(127.5)), g.const(1.0))
    planes = g.op("Transpose", g.op("Mul", scaled, one), perm=[0, 3, 1, 2])
    patches = g.op("AveragePool", planes, kernel_shape=[PATCH] * 2, strides=[PATCH] * 2)
    tokens = g.op("Transpose", g.op("Reshape", patches, g.shape(0, 3, N)), perm=[0, 2, 1])
    tokens = g.op("MatMul", tokens, g.const(3.0 * rng.standard_normal((3, D))))
    tokens = g.op("Tanh", g.op("Add", tokens, g.const(rng.standard_normal((N, D)))))
    for name in MEMORY:
        projected = g.op("MatMul", tokens, g.const(rng.standard_normal((D, D)) / 2))
        heads = g.op("Reshape", projected, g.shape(0, N, HEADS, HEAD_DIM))
        g.op("Transpose", heads, perm=[0, 2, 1, 3], output=name)
    images = helper.make_tensor_value_info("images", TensorProto.UINT8, ["B", SIDE, SIDE, 3])
    outputs = _floats(MEMORY, ["B", HEADS, N, HEAD_DIM])
    if embedding:
        pooled = g.op("ReduceMean", tokens, axes=[1], keepdims=0)
        pooled = g.op("MatMul", pooled, g.const(rng.standard_normal((D, E))))
        g.op("LpNormalization", pooled, axis=1, output=EMBEDDING)
        outputs += _floats([EMBEDDING], ["B", E])
    return g.finish([images], outputs)


def _matcher(seed):
    """Words on average, against the image's last layer and against its embedding."""
    rng = np.random.default_rng([seed, 2])
    g = _Graph()
    words = g.op("Gather", g.const(rng.standard_normal((V, D))), "token_ids")
    tokens = g.op("Gather", g.op("Shape", "token_ids"), g.const(1, np.int64))
    place = g.op("Range", g.const(0, np.int64), tokens, g.const(1, np.int64))
    lengths = g.op("Unsqueeze", "lengths", g.shape(1))
    shown = g.op("Cast", g.op("Less", place, lengths), to=TensorProto.FLOAT)
    shown = g.op("Unsqueeze", shown, g.shape(2))
    total = g.op("ReduceSum", g.op("Mul", words, shown), g.shape(1), keepdims=0)
    text = g.op("Div", total, g.op("Cast", lengths, to=TensorProto.FLOAT))
    keys, values = (g.op("Gather", name, "image", axis=0) for name in MEMORY[2:])
    seen = g.op("ReduceMean", g.op("Mul", keys, values), axes=[2], keepdims=0)
    seen = g.op("Reshape", seen, g.shape(0, D))
    fit = g.op("ReduceSum", g.op("Mul", text, seen), g.shape(1), keepdims=0)
    g.op("Sigmoid", g.op("Mul", fit, g.const(0.3)), output="match")
    text = g.op("MatMul", text, g.const(rng.standard_normal((D, E))))
    text = g.op("LpNormalization", text, axis=1)
    own = g.op("Gather", EMBEDDING, "image", axis=0)
    g.op("ReduceSum", g.op("Mul", text, own), g.shape(1), keepdims=0, output="similarity")
    inputs = [
        _ints("token_ids", ["C", "T"]),
        _ints("lengths", ["C"]),
        _ints("image", ["C"]),
        *_floats(MEMORY[2:], ["B", HEADS, N, HEAD_DIM]),
        *_floats([EMBEDDING], ["B", E]),
    ]
    return g.finish(inputs, _floats(["match", "similarity"], ["C"]))


def _attend(g, rows, keys, values, mask=None):
    """Attention of rows (R, D), laid out as the grid, on keys and values (S, H, .., Dh)."""
    grid = g.op("Reshape", g.op("Gather", rows, "cell_row"), g.shape(0, 0, HEADS, HEAD_DIM))
    q = g.op("Transpose", grid, perm=[0, 2, 1, 3])
    scores = g.op("MatMul", q, g.op("Transpose", keys, perm=[0, 1, 3, 2]))
    scores = g.op("Div", scores, g.const(HEAD_DIM**0.5))
    if mask:
        scores = g.op("Add", scores, mask)
    mixed = g.op("MatMul", g.op("Softmax", scores, axis=-1), values)
    heads = g.op("Reshape", g.op("Transpose", mixed, perm=[0, 2, 1, 3]), g.shape(0, 0, D))
    return g.op("GatherND", heads, "row_cell")


def _decoder(seed, *, nan=False):
    rng = np.random.default_rng([seed, 1])
    g = _Graph()

    def linear(x):
        return g.op("MatMul", x, g.const(rng.standard_normal((D, D)) / 2))

    x = g.op("Gather", g.const(rng.standard_normal((V, D))), "token_ids")
    positions = g.const(rng.standard_normal((TEXT.max_length, D)))
    x = g.op("Add", x, g.op("Gather", positions, "position"))
    for layer in range(L):
        keys_values = []
        for kind in "kv":
            new = g.op("Reshape", linear(x), g.shape(0, HEADS, HEAD_DIM))
            name = f"cache_{kind}.{layer}"
            keys_values.append(g.op("ScatterND", name, "write", new, output=next_name(name)))
        x = g.op("Tanh", g.op("Add", x, linear(_attend(g, linear(x), *keys_values, "visible"))))
        memory = [f"memory_{kind}.{layer}" for kind in "kv"]
        x = g.op("Tanh", g.op("Add", x, linear(_attend(g, linear(x), *memory))))

    unembedding = 0.8 * rng.standard_normal((D, V))
    if nan:
        unembedding[0, 0] = np.nan
    bias, slope = np.zeros(V), np.zeros(V)
    bias[[TEXT.pad_id, TEXT.bos_id, SPECIALS.index("<unk>")]] = -100.0
    bias[TEXT.eos_id], slope[TEXT.eos_id] = 0.5, 0.5  # so captions end, sooner or later
    g_position = g.op("Cast", "position", to=TensorProto.FLOAT)
    g_position = g.op("Unsqueeze", g_position, g.shape(1))
    late = g.op("Add", g.op("Mul", g_position, g.const(slope)), g.const(bias))
    logits = g.op("Add", g.op("MatMul", x, g.const(unembedding)), late)
    top = g.op("Min", "top_k", g.shape(V))
    g.nodes.append(
        helper.make_node(
            "TopK", [g.op("LogSoftmax", logits, axis=-1), top], ["log_probs", "ids"], axis=-1
        )
    )
    inputs = [
        _ints("token_ids", ["R"]),
        _ints("position", ["R"]),
        _ints("write", ["R", HEADS, 3]),
        _ints("row_cell", ["R", 2]),
        _ints("cell_row", ["S", "W"]),
        *_floats(["visible"], ["S", 1, "W", "N"]),
        _ints("top_k", [1]),
        *_floats(CACHE, ["S", HEADS, "N", HEAD_DIM]),
        *_floats(MEMORY, ["S", HEADS, N, HEAD_DIM]),
    ]
    outputs = [
        *_floats(["log_probs"], ["R", "M"]),
        _ints("ids", ["R", "M"]),
        *_floats(map(next_name, CACHE), ["S", HEADS, "N", HEAD_DIM]),
    ]
    return g.finish(inputs, outputs)


def _join():
    g = _Graph()
    dims = [HEADS, N, HEAD_DIM]
    for name in MEMORY:
        chosen = g.op("Gather", encoded_name(name), "source", axis=0)
        g.op("ScatterND", name, "slot", chosen, output=next_name(name))
    inputs = [
        _ints("source", ["J"]),
        _ints("slot", ["J", 1]),
        *_floats(MEMORY, ["S", *dims]),
        *_floats(map(encoded_name, MEMORY), ["B", *dims]),
    ]
    return g.finish(inputs, _floats(map(next_name, MEMORY), ["S", *dims]))
