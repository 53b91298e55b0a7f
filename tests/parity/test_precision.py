"""Bundles in fewer bits: what the server makes of them, and what the budget lets pass."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from pydantic import ValidationError

from exports.bundle import Bundle
from exports.manifest import Generation
from serving.captioner import Captioner
from serving.decode_image import ImageLimits, decode_image
from serving.params import Params
from trainer.decoding import beam_search
from trainer.errors import ParityError
from trainer.stages import _precision, export
from trainer.stages._model import Model
from trainer.stages._precision import Fp16, Int8, Precision

CARD = {"description": "d", "data": "d", "licence": "l", "failures": "f"}


@pytest.fixture(scope="module")
def both(exported: tuple[Path, Path], exported_fp16: Path) -> tuple[Captioner, Captioner]:
    """The server's captioners in float32 and in half precision."""
    return tuple(Captioner.load(path, threads=1) for path in (exported[1], exported_fp16))


def test_golden_captions_are_those_of_float32(
    both: tuple[Captioner, Captioner], exported_fp16: Path
) -> None:
    floats, half = both
    assert (floats.manifest.decoder.dtype, half.manifest.decoder.dtype) == ("float32", "float16")
    bundle = Bundle.open(exported_fp16)
    params = [Params.of(floats.manifest.defaults)]
    assert len(bundle.manifest.golden) >= 3
    for golden in bundle.manifest.golden:
        body = bundle.read(golden.image)
        pixels = [decode_image(body, floats.image_spec, ImageLimits())]
        [[caption]] = floats.caption_batch(pixels, params)
        assert (golden.token_ids, golden.text) == (caption.token_ids, caption.text)
        assert golden.score == pytest.approx(caption.score, abs=0.01)


def test_what_the_server_keeps_of_images_is_half_as_large(
    both: tuple[Captioner, Captioner],
) -> None:
    pixels = list(np.random.default_rng(0).integers(0, 256, (3, 64, 48, 3), np.uint8))
    sizes = [captioner.encode(pixels)[0].memory.size for captioner in both]
    assert sizes[0] == 2 * sizes[1] > 0
    params = [Params.of(both[0].manifest.defaults)] * 3
    for captioner, dtype in zip(both, (np.float32, np.float16), strict=True):
        captioner.caption_batch(pixels, params)
        decoding = captioner._decoding
        arenas = [*decoding._memory.values(), *decoding._cache.values()]
        assert {arena.numpy().dtype for arena in arenas} == {np.dtype(dtype)}


def test_the_server_captions_in_half_precision_as_the_trainer(
    both: tuple[Captioner, Captioner], exported_fp16: Path
) -> None:
    model = Model.open(exported_fp16)
    pixels = np.random.default_rng(1).integers(0, 256, (70, 64, 48, 3), np.uint8)  # over the slots
    generation = Generation(num_beams=3, num_captions=3, max_new_tokens=12)
    ours = beam_search(model.steps, pixels, generation)
    theirs = both[1].caption_batch(pixels, [Params.of(generation)] * len(pixels))
    same = 0
    for first, second in zip(ours, theirs, strict=True):
        same += [h.token_ids for h in first] == [c.token_ids for c in second]
        assert first[0].score == pytest.approx(second[0].score, abs=0.02)
    assert same >= 65  # the two add in other orders, and round what comes to halves


def test_a_slot_in_half_precision_is_as_new_once_it_is_cleared(
    both: tuple[Captioner, Captioner],
) -> None:
    _, half = both
    pixels = [np.full((64, 48, 3), 90, np.uint8)]
    params = [Params.of(half.manifest.defaults)]
    expected = half.caption_batch(pixels, params)
    for arena in half._decoding._cache.values():
        arena.update_inplace(np.full(arena.shape(), np.nan, np.float16))
    assert half.caption_batch(pixels, params) != expected
    for slot in range(64):
        half._decoding.clear(slot)
    assert half.caption_batch(pixels, params) == expected


def test_a_bundle_says_what_its_precision_changes(exported_fp16: Path, exported_int8: Path) -> None:
    for folder, name, words in (
        (exported_fp16, "fp16", "compute in half precision"),
        (exported_int8, "int8", "compute in 8-bit integers"),
    ):
        bundle = Bundle.open(folder)
        value, low, high = bundle.manifest.metrics[f"{name} - float32"]["CIDEr-D"]
        assert low <= value <= high
        assert bundle.manifest.provenance["budget"] == {"fp16": 0.05, "int8": 10.0}[name]
        assert words in bundle.read("MODEL_CARD.md").decode()
    half = onnx.load_from_string(Bundle.open(exported_fp16).read("decoder.onnx"))
    kinds = {tensor.data_type for tensor in half.graph.initializer if np.prod(tensor.dims) > 256}
    assert kinds == {onnx.TensorProto.FLOAT16}


def test_a_precision_that_spoils_captions_is_not_written(
    export_in: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    to_half = _precision.to_half

    def spoilt(graph: bytes, half: tuple[str, ...]) -> bytes:
        model = onnx.load_from_string(to_half(graph, half))
        for weight in model.graph.initializer:
            values = onnx.numpy_helper.to_array(weight)
            if (
                values.dtype == np.float16
                and values.ndim == 2
                and "log_probs" in model_outputs(model)
            ):
                blurred = np.where(np.arange(len(values))[:, None] % 2, 0, values)
                weight.CopyFrom(onnx.numpy_helper.from_array(blurred, weight.name))
        return model.SerializeToString()

    monkeypatch.setattr(_precision, "to_half", spoilt)
    with pytest.raises(ParityError, match=r"^\[fp16\] changes CIDEr-D by -\d") as caught:
        export_in(tmp_path, fp16={})
    assert "loss beyond fp16.budget = 0.05 cannot be ruled out (0 of 4" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


def model_outputs(model: onnx.ModelProto) -> set[str]:
    return {output.name for output in model.graph.output}


REFERENCES = [
    [f"a {color} {thing} near the {place}", f"one {thing} by a {place}"]
    for color in ("red", "blue", "green", "white", "black")
    for thing in ("boat", "dog", "tree", "man")
    for place in ("river", "house", "hill", "beach", "field")
]
"""Of 100 images."""


def captions(wrong: int) -> list[str]:
    """What float32 graphs say, of which as many are another image's."""
    right = [own[0] for own in REFERENCES]
    return [*right[1 : wrong + 1], *right[wrong:]]


@pytest.mark.parametrize("kind", [Int8(data=Path("unread")), Fp16()])
def test_the_lower_end_of_the_interval_decides(kind: Precision) -> None:
    good, floats = captions(wrong=0), captions(wrong=3)
    words, differences = kind.check(REFERENCES, good, good)
    assert "leaves 100 of 100 captions as they were" in words
    assert differences["CIDEr-D"].low == 0
    kind.check(REFERENCES, good, floats)  # a gain, however large, is none to refuse
    difference = kind.model_copy(update={"budget": 10.0}).check(REFERENCES, floats, good)[1]
    value, low = difference["CIDEr-D"].value, difference["CIDEr-D"].low
    assert low < value < 0
    between = kind.model_copy(update={"budget": -(low + value) / 2})  # more than what was measured
    with pytest.raises(
        ParityError, match=rf"^\[{kind.NAME}\] .* on 100 images, .* measure on more"
    ):
        between.check(REFERENCES, floats, good)
    kind.model_copy(update={"budget": -low + 1e-9}).check(REFERENCES, floats, good)


def test_one_image_tells_nothing() -> None:
    with (
        pytest.warns(UserWarning, match="CIDEr"),
        pytest.raises(ParityError, match="cannot be ruled out"),
    ):
        Fp16(budget=10.0).check(REFERENCES[:1], ["a dog"], ["a dog"])


def test_a_bundle_is_of_one_precision(exported: tuple[Path, Path]) -> None:
    run, _ = exported
    table = {"run": run, "name": "m", "data": "d", "card": CARD, "fp16": {}, "int8": {"data": "d"}}
    with pytest.raises(ValidationError, match=r"\[int8\] or \[fp16\]; export two for both"):
        export.Config.model_validate(table)
