"""A bundle small enough to write a hundred times; its graphs are bytes that nobody runs."""

from collections.abc import Callable
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

from exports.bundle import write_bundle
from exports.images import ImageSpec
from exports.manifest import DecoderSpec, EncoderSpec, Golden, Manifest
from exports.text import TextSpec

WORDS = ("<pad>", "<s>", "</s>", "a", "dog", "runs", "through", "the", "grass", "<unk>")


@pytest.fixture(scope="session")
def text_spec() -> TextSpec:
    return TextSpec(vocab_size=len(WORDS), bos_id=1, eos_id=2, pad_id=0, max_length=16)


@pytest.fixture(scope="session")
def tokenizer_json() -> bytes:
    """One token a word, lower case; `<s>` and `</s>` are special, `<pad>` is but a word."""
    backend = Tokenizer(
        models.WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="<unk>")
    )
    backend.normalizer = normalizers.Lowercase()
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.add_special_tokens(["<s>", "</s>"])
    backend.decoder = decoders.WordPiece()
    backend.enable_padding(length=12)
    backend.enable_truncation(max_length=4)
    return backend.to_str().encode()


@pytest.fixture(scope="session")
def files(tokenizer_json: bytes) -> dict[str, bytes]:
    return {
        "encoder.onnx": b"encoder" * 100,
        "decoder.onnx": b"decoder" * 100,
        "join.onnx": b"join",
        "tokenizer.json": tokenizer_json,
        "golden/dog.png": b"a picture of a dog",
        "MODEL_CARD.md": b"# tiny\n",
    }


@pytest.fixture(scope="session")
def manifest(text_spec: TextSpec) -> Manifest:
    return Manifest(
        name="tiny",
        version="0",
        created="2025-01-02T03:04:05Z",
        description="A bundle for tests.",
        licence="Apache-2.0",
        image=ImageSpec(height=8, width=8),
        text=text_spec,
        encoder=EncoderSpec(outputs=("memory_k.0", "memory_v.0")),
        decoder=DecoderSpec(
            layers=1,
            heads=2,
            head_dim=4,
            memory=("memory_k.0", "memory_v.0"),
            cache=("cache_k.0", "cache_v.0"),
        ),
        golden=(Golden(image="golden/dog.png", token_ids=(3, 4, 2), text="a dog", score=-0.5),),
        metrics={"CIDEr-D": 0.6, "CIDEr-D interval": [0.5, 0.7]},
        provenance={"recipe": {"optim": {"lr": 1e-3}}, "notes": None},
    )


@pytest.fixture
def write(manifest: Manifest, files: dict[str, bytes]) -> Callable[[Path], Path]:
    """Returns a function that writes the bundle to a folder and gives the folder back."""

    def write_to(path: Path) -> Path:
        write_bundle(path, manifest, files)
        return path

    return write_to
