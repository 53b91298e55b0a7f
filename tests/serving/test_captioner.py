"""The captioner on a tiny bundle: parameters, batches, and the proof that a bundle owes."""

import shutil
from dataclasses import replace

import numpy as np
import onnx
import pytest
from tiny_bundle import TEXT

from exports.bundle import Bundle, write_bundle
from serving.captioner import Captioner
from serving.decode_image import ImageLimits, decode_image
from serving.errors import BundleRejected, CaptionFailed, ParameterError
from serving.params import Params


@pytest.fixture(scope="module")
def pixels(tiny_captioner, photos):
    return [decode_image(body, tiny_captioner.image_spec, ImageLimits()) for body in photos]


@pytest.fixture(scope="module")
def defaults(tiny_captioner):
    return Params.of(tiny_captioner.manifest.defaults)


def test_captions_are_sorted_and_scored(tiny_captioner, pixels, defaults):
    params = replace(defaults, num_captions=4, length_penalty=0.7)
    for captions in tiny_captioner.caption_batch(pixels, [params] * len(pixels)):
        assert len({caption.text for caption in captions}) == 4
        assert captions == sorted(captions, key=lambda caption: -caption.score)
        for caption in captions:
            assert caption.tokens == len(caption.token_ids)
            assert caption.score == pytest.approx(caption.log_prob / caption.tokens**0.7, rel=1e-5)
            words = [i for i in caption.token_ids if i != TEXT.eos_id]
            assert len(caption.text.split()) == len(words)


def test_a_caption_is_the_same_alone_and_in_any_company(tiny_captioner, pixels, defaults):
    params = [
        defaults,
        replace(defaults, num_beams=1),
        replace(defaults, num_beams=7, num_captions=7, length_penalty=2.0),
        replace(defaults, prefix="a dog", max_new_tokens=3),
        replace(defaults, no_repeat_ngram_size=2, min_new_tokens=6),
        replace(defaults, prefix="the", num_beams=2, num_captions=2),
        replace(defaults, max_new_tokens=1),
        replace(defaults, length_penalty=-1.0),
    ]
    together = tiny_captioner.caption_batch(np.stack(pixels), params)
    assert len({captions[0].text for captions in together}) == len(pixels)
    for image, entry, captions in zip(pixels, params, together, strict=True):
        [alone] = tiny_captioner.caption_batch([image], [entry])
        assert [caption.token_ids for caption in alone] == [
            caption.token_ids for caption in captions
        ]
        assert alone[0].score == pytest.approx(captions[0].score, rel=1e-4)


def test_a_prefix_begins_the_caption_and_costs_nothing(tiny_captioner, pixels, defaults):
    params = replace(defaults, prefix=" A  small DOG", max_new_tokens=4, min_new_tokens=4)
    [[caption]] = tiny_captioner.caption_batch(pixels[:1], [params])
    assert caption.text.startswith("a small dog ")
    assert caption.tokens == 4
    assert len(caption.token_ids) == 7


def test_nan_costs_one_image_its_captions_and_no_other(
    tiny_captioner, pixels, defaults, black_photo
):
    black = decode_image(black_photo, tiny_captioner.image_spec, ImageLimits())
    batch = [pixels[0], black, pixels[1]]
    found = tiny_captioner.caption_batch(batch, [defaults] * 3)
    assert isinstance(found[1], CaptionFailed)
    assert [found[0], found[2]] == tiny_captioner.caption_batch(pixels[:2], [defaults] * 2)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_beams": 0}, "num_beams must be 1 to"),
        ({"num_beams": 999}, "num_beams must be 1 to"),
        ({"num_captions": 0}, "num_captions must be 1 to num_beams"),
        ({"num_captions": 5}, "num_captions must be 1 to num_beams"),
        ({"max_new_tokens": 0}, "max_new_tokens must be"),
        ({"min_new_tokens": -1}, "min_new_tokens must be"),
        ({"min_new_tokens": 13}, "min_new_tokens must be 0 to 12"),
        ({"max_new_tokens": 50, "min_new_tokens": 20}, "min_new_tokens must be 0 to 19"),
        ({"length_penalty": float("nan")}, "length_penalty must be"),
        ({"length_penalty": 11.0}, "length_penalty must be"),
        ({"no_repeat_ngram_size": -1}, "no_repeat_ngram_size must be"),
        ({"prefix": "dog " * 19}, "prefix must be shorter: the model writes 19 tokens"),
    ],
)
def test_parameters_out_of_range_are_named(tiny_captioner, defaults, changes, message):
    with pytest.raises(ParameterError, match=message):
        tiny_captioner.check(replace(defaults, **changes))


@pytest.mark.parametrize(
    "changes",
    [
        {"num_beams": TEXT.vocab_size, "num_captions": TEXT.vocab_size},
        {"max_new_tokens": 500, "min_new_tokens": 19},
        {"prefix": "dog " * 18, "min_new_tokens": 1},
        {"no_repeat_ngram_size": 1, "max_new_tokens": 19, "min_new_tokens": 19},
        {"length_penalty": 10.0},
        {"length_penalty": -10.0},
    ],
)
def test_parameters_at_the_edge_caption(tiny_captioner, pixels, defaults, changes):
    params = replace(defaults, **changes)
    tiny_captioner.check(params)
    [captions] = tiny_captioner.caption_batch(pixels[:1], [params])
    assert len(captions) == params.num_captions
    assert all(len(caption.token_ids) <= TEXT.max_length - 1 for caption in captions)
    assert all(np.isfinite(caption.score) for caption in captions)


def test_another_version_captions_otherwise(tiny_bundles, tiny_captioner, pixels, defaults):
    other = Captioner.load(tiny_bundles.two, threads=1)
    assert (tiny_captioner.name, tiny_captioner.version) == ("tiny", "1")
    assert (other.name, other.version) == ("tiny", "2")
    [[one]] = tiny_captioner.caption_batch(pixels[:1], [defaults])
    [[two]] = other.caption_batch(pixels[:1], [defaults])
    assert one.text != two.text


def test_a_bundle_must_give_its_golden_captions(tiny_bundles):
    with pytest.raises(BundleRejected, match=r"golden/1\.png is captioned '.+', but .* promises"):
        Captioner.load(tiny_bundles.broken_golden, threads=1)


def test_a_bundle_whose_numbers_are_not_numbers_is_refused(tiny_bundles):
    with pytest.raises(BundleRejected, match=r"golden/0\.png: .*numbers that are not finite"):
        Captioner.load(tiny_bundles.nan, threads=1)


@pytest.fixture
def bundle_with(tiny_bundles, tmp_path):
    """Writes version 1 with other bytes for some files."""

    def write(**changed):
        bundle = Bundle.open(tiny_bundles.one)
        files = bundle.files() | {f"{name}.onnx": body for name, body in changed.items()}
        write_bundle(tmp_path / "changed", bundle.manifest, files)
        return tmp_path / "changed"

    return write


def test_a_step_that_fails_costs_one_image_its_captions(
    tiny_captioner, pixels, defaults, monkeypatch
):
    expected = tiny_captioner.caption_batch(pixels[:3], [defaults] * 3)
    decoding = tiny_captioner._decoding
    plain, failures = decoding.step, []

    def step(rows, top_k):
        if 1 in rows.slot and rows.position[rows.slot == 1][0] == 2:
            failures.append(len(rows.slot))
            raise RuntimeError("/secret/node failed")
        return plain(rows, top_k)

    monkeypatch.setattr(decoding, "step", step)
    found = tiny_captioner.caption_batch(pixels[:3], [defaults] * 3)
    assert isinstance(found[1], CaptionFailed)
    assert found[1].detail == "tiny@1 failed on this image."
    assert [found[0], found[2]] == [expected[0], expected[2]]
    assert failures[0] > failures[1]  # all together, then alone; the next steps did without it
    assert len(failures) == 2
    monkeypatch.undo()
    assert tiny_captioner.caption_batch(pixels[:3], [defaults] * 3) == expected


def test_what_onnx_runtime_says_stands_in_the_log_alone(
    bundle_with, tiny_bundles, caplog, monkeypatch
):
    node = onnx.helper.make_node("NoSuchOperator", [], ["found"])
    found = onnx.helper.make_tensor_value_info("found", onnx.TensorProto.FLOAT, [1])
    unknown = onnx.helper.make_model(onnx.helper.make_graph([node], "unknown", [], [found]))
    with pytest.raises(BundleRejected, match=r"do not load; the server's log says why$"):
        Captioner.load(bundle_with(decoder=unknown.SerializeToString()), threads=1)
    assert "onnxruntime" in caplog.text

    def fail(*_):
        raise RuntimeError("/secret/node failed")

    for broken, told in (
        ("serving.captioner.Beams.advance", "tiny@1 failed on this image"),
        ("serving.captioner.OnnxSession.encode", r"do not run; the server's log says why$"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(broken, fail)
            with pytest.raises(BundleRejected, match=told):
                Captioner.load(tiny_bundles.one, threads=1)
    assert "/secret/node failed" in caplog.text


def test_own_words_about_the_graphs_are_shown(bundle_with, tiny_bundles):
    encoder = Bundle.open(tiny_bundles.one).read("encoder.onnx")
    with pytest.raises(BundleRejected, match="the decoder has the inputs"):
        Captioner.load(bundle_with(decoder=encoder), threads=1)


def test_chosen_parameters_win_over_the_defaults(defaults, tiny_captioner):
    chosen = Params.of(tiny_captioner.manifest.defaults, num_beams=2, prefix="a dog")
    assert chosen == replace(defaults, num_beams=2, prefix="a dog")


def test_a_tampered_bundle_is_refused_before_its_graphs_are_loaded(tiny_bundles, tmp_path):
    copy = tmp_path / "bundle"
    shutil.copytree(tiny_bundles.one, copy)
    graph = copy / "decoder.onnx"
    body = bytearray(graph.read_bytes())
    body[len(body) // 2] ^= 1
    graph.write_bytes(body)
    with pytest.raises(BundleRejected, match=r"decoder\.onnx"):
        Captioner.load(copy, threads=1)
