import os
from collections.abc import Callable
from pathlib import Path

import pytest
from pydantic import ValidationError

from exports.bundle import Bundle, write_bundle
from exports.errors import BundleError
from exports.manifest import (
    DecoderSpec,
    EncoderSpec,
    Generation,
    Manifest,
    MatcherSpec,
    Reranking,
)

NAMES = (
    "manifest.json",
    "encoder.onnx",
    "decoder.onnx",
    "tokenizer.json",
    "golden/dog.png",
    "MODEL_CARD.md",
)
Write = Callable[[Path], Path]


def test_what_was_written_is_what_is_read(
    tmp_path: Path, manifest: Manifest, files: dict[str, bytes]
) -> None:
    written = write_bundle(tmp_path / "deep" / "bundle", manifest, files)

    bundle = Bundle.open(tmp_path / "deep" / "bundle")

    assert bundle.manifest == written
    assert bundle.manifest == manifest.model_copy(update={"files": written.files})
    assert bundle.files() == files
    assert {path.name for path in (tmp_path / "deep").iterdir()} == {"bundle"}


def test_reading_never_goes_back_to_the_disk(tmp_path: Path, write: Write) -> None:
    bundle = Bundle.open(write(tmp_path / "bundle"))
    (tmp_path / "bundle" / "encoder.onnx").write_bytes(b"swapped after the check")

    assert bundle.read("encoder.onnx") == b"encoder" * 100
    with pytest.raises(BundleError, match=r"matcher\.onnx"):
        bundle.read("matcher.onnx")


@pytest.mark.parametrize("name", NAMES)
def test_one_flipped_bit_is_refused_by_name(tmp_path: Path, write: Write, name: str) -> None:
    path = write(tmp_path / "bundle")
    body = bytearray((path / name).read_bytes())
    body[len(body) // 2] ^= 0x80
    (path / name).write_bytes(body)

    with pytest.raises(BundleError) as caught:
        Bundle.open(path)
    assert name in str(caught.value)


@pytest.mark.parametrize("name", NAMES)
def test_a_missing_file_is_refused_by_name(tmp_path: Path, write: Write, name: str) -> None:
    path = write(tmp_path / "bundle")
    (path / name).unlink()

    with pytest.raises(BundleError) as caught:
        Bundle.open(path)
    assert name in str(caught.value)


@pytest.mark.parametrize("name", NAMES)
def test_a_truncated_file_is_refused_by_name(tmp_path: Path, write: Write, name: str) -> None:
    path = write(tmp_path / "bundle")
    os.truncate(path / name, (path / name).stat().st_size - 1 - (name == "manifest.json"))

    with pytest.raises(BundleError) as caught:
        Bundle.open(path)
    assert name in str(caught.value)


@pytest.mark.parametrize("name", NAMES)
def test_a_symbolic_link_is_refused_by_name(tmp_path: Path, write: Write, name: str) -> None:
    path = write(tmp_path / "bundle")
    (path / name).rename(tmp_path / "elsewhere")
    (path / name).symlink_to(tmp_path / "elsewhere")

    with pytest.raises(BundleError) as caught:
        Bundle.open(path)
    assert f"{name} is a symbolic link" in str(caught.value)


def test_a_linked_folder_and_a_pipe_are_refused(tmp_path: Path, write: Write) -> None:
    path = write(tmp_path / "bundle")
    (path / "golden").rename(tmp_path / "golden")
    (path / "golden").symlink_to(tmp_path / "golden")
    with pytest.raises(BundleError, match="golden is a symbolic link"):
        Bundle.open(path)

    (path / "golden").unlink()
    (tmp_path / "golden").rename(path / "golden")
    os.mkfifo(path / "pipe")
    with pytest.raises(BundleError, match="pipe is neither a file nor a folder"):
        Bundle.open(path)


@pytest.mark.parametrize("name", ["weights.bin", "golden/cat.png", ".hidden"])
def test_an_extra_file_is_refused_by_name(tmp_path: Path, write: Write, name: str) -> None:
    path = write(tmp_path / "bundle")
    (path / name).write_bytes(b"")

    with pytest.raises(BundleError) as caught:
        Bundle.open(path)
    assert f"{name} is there" in str(caught.value)


def test_a_bundle_is_never_overwritten(
    tmp_path: Path, write: Write, manifest: Manifest, files: dict[str, bytes]
) -> None:
    path = write(tmp_path / "bundle")
    before = Bundle.open(path).digest

    with pytest.raises(BundleError, match="exists already"):
        write_bundle(path, manifest, {**files, "MODEL_CARD.md": b"another"})
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    with pytest.raises(BundleError, match="exists already"):
        write_bundle(tmp_path / "dangling", manifest, files)

    assert Bundle.open(path).digest == before
    assert {path.name for path in tmp_path.iterdir()} == {"bundle", "dangling"}


@pytest.mark.parametrize("name", ["encoder.onnx", "tokenizer.json", "golden/dog.png"])
def test_a_file_that_the_manifest_names_must_be_given(
    tmp_path: Path, manifest: Manifest, files: dict[str, bytes], name: str
) -> None:
    with pytest.raises(BundleError) as caught:
        write_bundle(
            tmp_path / "bundle", manifest, {key: files[key] for key in files if key != name}
        )
    assert name in str(caught.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "name", ["../evil", "/etc/passwd", "a//b", "a/../../b", ".", "a\\b", "", "manifest.json", ".x"]
)
def test_no_file_can_be_outside_of_the_folder(
    tmp_path: Path, manifest: Manifest, files: dict[str, bytes], name: str
) -> None:
    with pytest.raises(BundleError, match="no name for a file"):
        write_bundle(tmp_path / "bundle", manifest, {**files, name: b""})
    assert not list(tmp_path.iterdir())


def test_a_misspelt_field_is_named(tmp_path: Path, write: Write) -> None:
    path = write(tmp_path / "bundle") / "manifest.json"
    path.write_text(path.read_text().replace('"licence"', '"license"'))

    with pytest.raises(BundleError, match=r"manifest\.json: licence"):
        Bundle.open(path.parent)


def test_a_later_schema_is_refused(tmp_path: Path, write: Write) -> None:
    path = write(tmp_path / "bundle") / "manifest.json"
    path.write_text(path.read_text().replace('"schema_version": 2', '"schema_version": 3'))

    with pytest.raises(BundleError, match="schema_version"):
        Bundle.open(path.parent)


def test_graphs_that_do_not_fit_each_other_are_refused(manifest: Manifest) -> None:
    with pytest.raises(ValidationError, match="cache names 1 tensors"):
        DecoderSpec(layers=1, heads=1, head_dim=1, memory=("m",), cache=("k",))
    decoder = manifest.decoder.model_copy(update={"memory": ("memory_k.0",)})
    with pytest.raises(BundleError, match="name different tensors"):
        Manifest.from_json(manifest.model_copy(update={"decoder": decoder}).to_json())


@pytest.mark.parametrize(
    "fields",
    [
        {"num_beams": 0},
        {"num_beams": 2, "num_captions": 3},
        {"min_new_tokens": 9, "max_new_tokens": 8},
        {"length_penalty": float("nan")},
        {"beams": 4},
    ],
)
def test_impossible_generation_settings_are_refused(fields: dict[str, float]) -> None:
    with pytest.raises(ValidationError):
        Generation.model_validate(fields)


EMBEDDED = ("memory_k.0", "memory_v.0", "image_embedding")


@pytest.mark.parametrize(
    ("outputs", "changes", "message"),
    [
        (EMBEDDED[:2], {}, "decoder.memory and matcher.image_embedding, no more"),
        ((*EMBEDDED, "more"), {}, "decoder.memory and matcher.image_embedding, no more"),
        (EMBEDDED, {"memory": ("memory_k.7",)}, "matcher.memory names tensors"),
        (EMBEDDED[:2], {"image_embedding": "memory_k.0"}, "must not be one of decoder.memory"),
    ],
)
def test_a_matcher_must_fit_the_other_graphs(
    manifest: Manifest, outputs: tuple[str, ...], changes: dict[str, object], message: str
) -> None:
    spec = MatcherSpec(memory=EMBEDDED[:1], reranking=Reranking(temperature=0.1))
    encoder = EncoderSpec(outputs=EMBEDDED)
    fits = manifest.model_copy(update={"encoder": encoder, "matcher": spec})
    assert Manifest.from_json(fits.to_json()) == fits
    assert "matcher.onnx" in fits.required_files()
    assert (manifest.reranks, fits.reranks) == (("none",), ("none", "itm", "clip"))
    wrong = {"encoder": EncoderSpec(outputs=outputs), "matcher": spec.model_copy(update=changes)}
    with pytest.raises(BundleError, match=message):
        Manifest.from_json(manifest.model_copy(update=wrong).to_json())
