"""Captions sorted by how well they fit: by the graph of the tiny bundle, and by a script."""

import math
from dataclasses import replace

import numpy as np
import pytest
from live import as_base64, captions_of, check_problem, running, until

from exports.registry import Registry
from exports.text import framed
from serving.captioner import Captioner
from serving.decode_image import ImageLimits, decode_image
from serving.errors import BundleRejected, CaptionFailed, ParameterError
from serving.matcher import Match
from serving.params import Params
from serving.session import OnnxSession

NEAR = 1e-6  # float32, where captions are fewer or padded less


@pytest.fixture(scope="module")
def pixels(matching_captioner, photos):
    return [decode_image(body, matching_captioner.image_spec, ImageLimits()) for body in photos]


@pytest.fixture(scope="module")
def wide(matching_captioner):
    """All that the search finds."""
    defaults = matching_captioner.manifest.defaults
    return Params.of(defaults, num_beams=5, num_captions=5)


@pytest.fixture
def scripted(matching_captioner, monkeypatch):
    """Lets a function of token ids say how well a caption fits, instead of the graph."""

    def script(fits):
        def match(memory, index, captions, observer=None):
            return [Match(*fits(caption)) for caption in captions]

        monkeypatch.setattr(matching_captioner._matcher, "match", match)

    return script


def test_the_best_of_all_found_is_what_an_oracle_says(matching_captioner, pixels, wide, scripted):
    found = matching_captioner.caption_batch(pixels, [wide] * len(pixels))
    wanted = {captions[at % 5].token_ids for at, captions in enumerate(found)}
    scripted(lambda caption: (1.0, 1.0) if caption in wanted else (1e-6, -1.0))
    for rerank in ("itm", "clip"):
        best = matching_captioner.caption_batch(
            pixels, [replace(wide, rerank=rerank, num_captions=1)] * len(pixels)
        )
        for own, [caption] in zip(found, best, strict=True):
            assert caption.token_ids in wanted
            # Of those that the oracle wants, of this image or another, the search's order decides.
            assert caption.token_ids == next(c.token_ids for c in own if c.token_ids in wanted)


def test_no_match_at_all_leaves_the_search_its_order(matching_captioner, pixels, wide, scripted):
    found = matching_captioner.caption_batch(pixels, [wide] * len(pixels))
    scripted(lambda caption: (0.0, 0.5))  # log(0) counts as the log of 1e-9
    for rerank in ("itm", "clip"):
        same = matching_captioner.caption_batch(
            pixels, [replace(wide, rerank=rerank)] * len(pixels)
        )
        assert [[c.token_ids for c in own] for own in same] == [
            [c.token_ids for c in own] for own in found
        ]


@pytest.mark.parametrize("rerank", ["itm", "clip"])
def test_captions_are_sorted_by_the_formula(matching_captioner, pixels, wide, rerank):
    reranking = matching_captioner.manifest.matcher.reranking
    plain = matching_captioner.caption_batch(pixels, [wide] * len(pixels))
    params = replace(wide, rerank=rerank)
    moved = 0
    for own, captions in zip(
        plain, matching_captioner.caption_batch(pixels, [params] * len(pixels)), strict=True
    ):
        ranks = [
            0.25 * c.score + 0.75 * math.log(c.match)
            if rerank == "itm"
            else 0.5 * c.score + 0.5 * c.similarity / reranking.temperature
            for c in captions
        ]
        assert ranks == sorted(ranks, reverse=True)
        assert all(0 < c.match < 1 and -1 <= c.similarity <= 1 for c in captions)
        assert {replace(c, match=None, similarity=None) for c in captions} == set(own)
        moved += captions[0].token_ids != own[0].token_ids
    assert moved  # else this would tell nothing


def test_without_reranking_nothing_is_other_than_without_a_matcher(
    matching_captioner, tiny_captioner, pixels, wide
):
    for params in (wide, replace(wide, num_captions=1), replace(wide, num_beams=1, num_captions=1)):
        with_matcher, without = (
            captioner.caption_batch(pixels, [params] * len(pixels))
            for captioner in (matching_captioner, tiny_captioner)
        )
        assert with_matcher == without  # scores to the last bit, and no match


def test_a_caption_fits_as_well_alone_as_in_any_company(matching_captioner, pixels, wide):
    ways = [
        replace(wide, rerank="itm"),
        replace(wide, rerank="clip", num_beams=1, num_captions=1),
        wide,
        replace(wide, rerank="itm", num_beams=3, num_captions=2, prefix="a dog"),
    ]
    params = [ways[at % len(ways)] for at in range(len(pixels))]
    together = matching_captioner.caption_batch(pixels, params)
    for image, entry, captions in zip(pixels, params, together, strict=True):
        [alone] = matching_captioner.caption_batch([image], [entry])
        for one, other in zip(alone, captions, strict=True):
            assert one.token_ids == other.token_ids
            assert (one.match, one.similarity) == (other.match, other.similarity)
    # Of one image's captions, each by itself.
    [encoded] = matching_captioner.encode(pixels[:1])
    for caption in together[0]:
        [match] = matching_captioner._matcher.match(
            encoded.memory, encoded.index, [caption.token_ids]
        )
        assert match == pytest.approx((caption.match, caption.similarity), abs=NEAR)


def test_the_matcher_sees_the_right_image_of_a_batch(matching_captioner, pixels, wide):
    params = replace(wide, rerank="itm", num_captions=1)
    together = matching_captioner.caption_batch(pixels, [params] * len(pixels))
    encoded = matching_captioner.encode(pixels)
    caption = together[0][0].token_ids
    matches = [
        matching_captioner._matcher.match(one.memory, one.index, [caption])[0] for one in encoded
    ]
    assert len(set(matches)) == len(pixels)
    assert matches[0] == pytest.approx((together[0][0].match, together[0][0].similarity), abs=NEAR)


def test_an_image_that_comes_again_is_matched_from_the_cache(tiny_bundles, pixels, wide):
    captioner = Captioner.load(tiny_bundles.matching, threads=1, cache_bytes=10**7)
    params = [replace(wide, rerank="clip")]
    first = captioner.caption_batch(pixels[:1], params)
    hits, held = captioner._memories.hits, captioner._memories.held
    assert captioner.caption_batch(pixels[:1], params) == first
    assert captioner._memories.hits == hits + 1
    [encoded] = captioner.encode(pixels[:1])
    values, images = encoded.memory.values, encoded.memory.images
    size = sum(4 * int(np.prod(value.shape())) for value in values)
    assert encoded.memory.size == size + 4 * 6 * images
    assert held >= encoded.memory.size


def test_a_matcher_that_fails_costs_one_image_its_captions(
    matching_captioner, pixels, wide, monkeypatch
):
    plain, calls = matching_captioner._matcher.match, []

    def match(*arguments):
        calls.append(1)
        if len(calls) == 2:
            raise RuntimeError("/secret/node failed")
        found = plain(*arguments)
        return [Match(math.nan, 0.0), *found[1:]] if len(calls) == 3 else found

    monkeypatch.setattr(matching_captioner._matcher, "match", match)
    params = replace(wide, rerank="itm", max_new_tokens=4)
    found = matching_captioner.caption_batch(pixels[:4], [params] * 4)
    failed = sorted(one.detail for one in found if isinstance(one, CaptionFailed))
    assert failed == [
        "tiny@5 failed on this image.",
        "tiny@5 gave numbers that are not finite for this image.",
    ]
    assert len(calls) == 4
    assert not matching_captioner._wishes


def test_an_image_that_leaves_is_forgotten(matching_captioner, pixels, wide):
    [encoded] = matching_captioner.encode(pixels[:1])
    slot = matching_captioner.join(encoded, replace(wide, rerank="itm"))
    assert list(matching_captioner._wishes) == [slot]
    matching_captioner.leave(slot)
    assert not matching_captioner._wishes


def test_reranking_without_a_matcher_is_refused(tiny_captioner, matching_captioner, wide):
    for rerank in ("itm", "clip"):
        with pytest.raises(ParameterError, match="rerank must be none, since tiny@1 has no match"):
            tiny_captioner.check(replace(wide, rerank=rerank))
    with pytest.raises(ParameterError, match=r"rerank must be none or itm or clip\."):
        matching_captioner.check(replace(wide, rerank="blip"))


def test_a_golden_caption_must_fit_as_promised(tiny_bundles):
    with pytest.raises(BundleRejected, match=r"golden/1\.png: the match of '.+' is 0\.\d+, but"):
        Captioner.load(tiny_bundles.broken_match, threads=1)


def test_the_proof_encodes_each_golden_image_once(tiny_bundles, monkeypatch):
    encoded, encode = [], OnnxSession.encode

    def counted(session, pixels, observer=None):
        encoded.append(len(pixels))
        return encode(session, pixels, observer)

    monkeypatch.setattr(OnnxSession, "encode", counted)
    captioner = Captioner.load(tiny_bundles.matching, threads=1)
    assert encoded == [len(captioner.manifest.golden)]


def test_captions_are_framed_for_the_matcher(tiny_captioner):
    text = tiny_captioner.manifest.text  # at most 20 tokens
    token_ids, lengths = framed([(5, 6, 2), (7,), tuple(range(4, 23))], text)
    assert token_ids[0, :5].tolist() == [1, 5, 6, 2, 0]
    assert token_ids[1, :4].tolist() == [1, 7, 2, 0]  # cut: it gets an end
    assert token_ids[2].tolist() == [1, *range(4, 23)]  # where there is room
    assert lengths.tolist() == [4, 3, 20]


def test_the_interface_swaps_between_bundles_with_and_without_a_matcher(
    tmp_path, tiny_bundles, photos
):
    registry = Registry(tmp_path / "models")
    registry.publish(tiny_bundles.one)
    registry.publish(tiny_bundles.matching)
    registry.promote("tiny", "1")
    with running(tmp_path / "models") as live:

        def active():
            return live.client.get("/v1/models").json()["models"][0]["active"]

        def put_to_work(version):
            registry.promote("tiny", version)
            until(lambda: active()["version"] == version)

        def refused():
            for send in (
                live.caption(photos[0], params={"rerank": "itm"}),
                live.client.post(
                    "/v1/captions", json={"images": as_base64(photos[0]), "rerank": "clip"}
                ),
            ):
                problem = check_problem(send, 422)
                assert problem["detail"] == "rerank must be none, since tiny@1 has no matcher."

        refused()
        assert active()["rerank"] == ["none"]
        [plain] = captions_of(live.caption(photos[0], params={"num_captions": 2}))

        put_to_work("2")
        assert active()["rerank"] == ["none", "itm", "clip"]
        assert captions_of(live.caption(photos[0], params={"num_captions": 2})) == [plain]
        assert set(plain[0]) == {"text", "score", "log_prob", "tokens"}
        wanted = {"num_captions": 2, "rerank": "itm"}
        files = [("image", ("a.png", photos[0]))]
        answers = [
            live.caption(photos[0], params=wanted),
            live.client.post("/v1/captions", files=files, data=wanted),
            live.client.post("/v1/captions", json={"images": as_base64(photos[0]), **wanted}),
        ]
        found = [captions_of(answer) for answer in answers]
        assert found[0] == found[1] == found[2]
        for caption in found[0][0]:
            assert set(caption) == {*plain[0], "match", "similarity"}
        assert live.metrics()["cutline_match_seconds_count",] == 3
        check_problem(live.caption(photos[0], params={"rerank": "blip"}), 422)

        put_to_work("1")
        refused()
