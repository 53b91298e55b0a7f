"""Metrics equal the public COCO scorers: hand-checked values, and random captions they scored."""

import json
import random
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from exports.wording import ngrams, words
from trainer import variants
from trainer.errors import DataError
from trainer.metrics import bad_endings, bleu, cider, distinct, length, repetition, rouge
from trainer.metrics._hashes import count_ngrams, places_of
from trainer.metrics._scores import Scores

REFERENCES = [
    ["a dog runs on the grass", "a brown dog is running in a field"],
    ["a red bus parked on the street", "a bus on a city street"],
    ["two people ride bikes near the sea", "people riding bicycles by the ocean"],
]
CANDIDATES = ["a dog runs on the grass", "a red bus on the street", "a man is eating pizza"]

GOLDEN = Path(__file__).parents[1] / "golden" / "caption_metrics.json"
CORPORA: list[dict[str, Any]] = json.loads(GOLDEN.read_text())["corpora"]


def _close(actual: object, expected: object) -> bool:
    return bool(np.allclose(np.asarray(actual), np.asarray(expected), rtol=0, atol=1e-6))


def test_the_golden_corpus() -> None:
    scored = bleu.score(REFERENCES, CANDIDATES)
    assert _close(list(scored.corpus.values()), [0.665558, 0.669507, 0.613161, 0.534320])
    scored = rouge.score(REFERENCES, CANDIDATES)
    assert _close(scored.corpus["ROUGE-L"], 0.636816)
    assert _close(scored.per_image[:, 0], [1.0, 0.910448, 0.0])
    scored = cider.score(REFERENCES, CANDIDATES)
    assert _close(scored.corpus["CIDEr-D"], 2.978819)
    assert _close(scored.per_image[:, 0], [5.325110, 3.611346, 0.0])


@pytest.mark.parametrize("corpus", CORPORA, ids=lambda corpus: f"{len(corpus['candidates'])}")
def test_random_captions_score_as_the_public_scorers_say(corpus: dict[str, Any]) -> None:
    pair = corpus["references"], corpus["candidates"]
    scored = bleu.score(*pair)
    assert _close(list(scored.corpus.values()), corpus["bleu"])
    assert _close(scored.per_image, corpus["bleu_images"])
    scored = cider.score(*pair)
    assert _close(scored.corpus["CIDEr-D"], corpus["cider"])
    assert _close(scored.per_image[:, 0], corpus["cider_images"])
    scored = rouge.score(*pair)
    assert _close(scored.corpus["ROUGE-L"], corpus["rouge"])
    assert _close(scored.per_image[:, 0], corpus["rouge_images"])


def test_bleu_clips_repeated_words() -> None:
    scored = bleu.score([["the cat is on the mat"]], ["the the the the the the the"])
    assert _close(scored.corpus["BLEU-1"], 2 / 7)


def test_cider_of_an_exact_match_is_ten() -> None:
    single = [group[:1] for group in REFERENCES]
    assert _close(cider.score(single, [group[0] for group in single]).per_image[:, 0], 10.0)


def test_cider_clips_repeats_and_penalises_length() -> None:
    single = [group[:1] for group in REFERENCES]
    repeated = cider.score(single, ["a " * 10, *CANDIDATES[1:]])
    assert _close(repeated.per_image[0, 0], 0.040842)


def test_cider_counts_length_in_bigrams() -> None:
    """Between one word and none there is no difference in length: exp(0), not exp(-1/72)."""
    scorer = cider.CiderD([["dog"], ["cat"]])
    assert _close(scorer.score(0, "dog"), 10 / 4)
    longer = scorer.score(0, "dog barks")  # one bigram more; cosine 1/sqrt(2) for equal idf
    assert _close(longer, 10 / 4 * 0.986207 / np.sqrt(2))


@pytest.mark.parametrize("references", [[["a dog"]], [["a dog"], ["a dog"]]])
def test_cider_of_too_small_a_corpus_warns_and_is_nan(references: list[list[str]]) -> None:
    with pytest.warns(cider.CorpusTooSmallWarning, match="Score more images"):
        scored = cider.score(references, ["a dog"] * len(references))
    assert np.isnan(scored.corpus["CIDEr-D"])
    assert np.isnan(scored.per_image).all()


def test_frozen_frequencies_make_scores_independent_of_the_corpus() -> None:
    frequencies = cider.DocumentFrequencies.of(REFERENCES)
    alone = cider.score(REFERENCES[:1], CANDIDATES[:1], frequencies=frequencies)
    assert _close(alone.corpus["CIDEr-D"], 5.325110)
    scorer = cider.CiderD(REFERENCES[1:], frequencies=frequencies)
    assert _close(scorer.score(0, CANDIDATES[1]), 3.611346)


def slow_cider(references: list[list[str]], image: int, caption: str) -> float:
    """The formula of the module, n-gram by n-gram."""

    def vector(text: str, order: int) -> dict[tuple[str, ...], float]:
        counts = ngrams(words(text), order)
        having = {
            one: sum(any(one in ngrams(words(r), order) for r in own) for own in references)
            for one in counts
        }
        return {g: n * np.log(len(references) / max(1, having[g])) for g, n in counts.items()}

    total = 0.0
    for reference in references[image]:
        apart = max(0, len(words(caption)) - 1) - max(0, len(words(reference)) - 1)
        for order in (1, 2, 3, 4):
            mine, theirs = vector(caption, order), vector(reference, order)
            norms = [np.sqrt(sum(w * w for w in one.values())) for one in (mine, theirs)]
            dot = sum(min(w, theirs.get(g, 0)) * theirs.get(g, 0) for g, w in mine.items())
            total += np.exp(-(apart**2) / 72) * dot / np.prod(norms) if dot else 0.0
    return 10 * total / 4 / len(references[image])


def test_cider_of_many_at_once_is_that_of_each() -> None:
    draw = random.Random(0)

    def caption() -> str:
        return " ".join(draw.choices("abcdefgh", (8, 4, 2, 2, 1, 1, 1, 1), k=draw.randint(0, 9)))

    references = [[caption() for _ in range(draw.randint(1, 5))] for _ in range(8)]
    scorer = cider.CiderD(references)
    images = draw.choices(range(8), k=16)
    # Words that no reference has, the same twice among them; a true caption; no word.
    captions = [f"{caption()} {draw.choice(['', 'x', 'x x', 'y z x y z'])}" for _ in range(14)]
    captions += ["", max(references[images[-1]], key=len)]
    expected = [slow_cider(references, *pair) for pair in zip(images, captions, strict=True)]
    assert np.allclose(scorer.scores(images, captions), expected, rtol=0, atol=1e-12)
    alone = [scorer.score(*pair) for pair in zip(images, captions, strict=True)]
    assert np.allclose(alone, expected, rtol=0, atol=1e-12)
    assert max(expected) > 1


def test_every_ngram_has_a_number_of_its_own() -> None:
    """Words in another order, or nested: what a careless hash mixes up."""
    captions = [one.split() for one in ("a b c d", "d c b a", "b a", "ab c", "a bc", "a a a a", "")]
    found = count_ngrams(captions)
    expected = {
        (row, ngram): count
        for row, tokens in enumerate(captions)
        for order in (1, 2, 3, 4)
        for ngram, count in ngrams(tokens, order).items()
    }
    distinct_ngrams = {ngram for _, ngram in expected}
    assert len(found.numbers) == len(distinct_ngrams)
    assert sorted(found.count.tolist()) == sorted(expected.values())
    per_caption = np.bincount(found.caption, found.count, minlength=7).tolist()
    assert per_caption == [10, 10, 3, 3, 3, 10, 0]
    assert found.lengths.tolist() == [4, 4, 2, 2, 2, 4, 0]
    _, known = places_of(count_ngrams([["b", "a"], ["q"]]).numbers, found.numbers)
    assert known.sum() == 3 and len(known) == 4


def test_captions_that_repeat_or_break_off_are_counted() -> None:
    said = [
        "A red, red bus.",
        "a dog in the snow in the snow",
        "a dog and a dog and a dog",
        "a dog in the snow in the park",
        "a man walks by",
        "a man with a",
        "two dogs and",
        "",
    ]
    references = [["x"]] * len(said)
    assert repetition.score(references, said).per_image[:, 0].tolist() == [1, 1, 1, 0, 0, 0, 0, 0]
    ends = bad_endings.score(references, said)
    assert ends.per_image[:, 0].tolist() == [0, 0, 0, 0, 0, 1, 1, 0]
    assert ends.corpus == {"bad endings": 0.25}
    assert length.score(references, said).corpus == {"length": 39 / 8}


def test_rouge_finds_the_longest_common_subsequence() -> None:
    def slow(first: list[str], second: list[str]) -> int:
        table = np.zeros((len(first) + 1, len(second) + 1), dtype=int)
        for i, j in product(range(len(first)), range(len(second))):
            longer = table[i, j] + 1 if first[i] == second[j] else 0
            table[i + 1, j + 1] = max(longer, table[i, j + 1], table[i + 1, j])
        return int(table[-1, -1])

    generator = random.Random(5)
    for _ in range(200):
        first, second = (generator.choices("abcd", k=generator.randint(0, 80)) for _ in range(2))
        assert rouge._longest_common(first, second) == slow(first, second)


def test_distinct_counts_captions_not_spellings() -> None:
    scored = distinct.score([["x"]] * 4, ["A dog.", "a dog", "a cat", "a cat and a dog"])
    assert scored.corpus == {"distinct": 0.75}


@pytest.mark.parametrize(
    ("caption", "expected"),
    [
        ("A man's T-shirt, 2 dogs .", "a man s t shirt 2 dogs"),
        ("Cafe\u0301 \u00abBar\u00bb", "caf\u00e9 bar"),
        (" ... ", ""),
        (
            "\u0939\u093f\u0928\u094d\u0926\u0940 \u092c\u091a\u094d\u091a\u0947",
            None,
        ),  # Hindi, with vowel signs
        ("\u0e20\u0e32\u0e1e\u0e17\u0e35\u0e48", None),  # Thai, with a vowel and a tone mark
        ("\u0130stanbul", "i\u0307stanbul"),
    ],
)
def test_words_are_lower_case_letters_and_digits(caption: str, expected: str | None) -> None:
    assert " ".join(words(caption)) == (caption if expected is None else expected)


@pytest.mark.parametrize("name", variants.names("metrics"))
def test_every_metric_keeps_the_contract(name: str) -> None:
    score = variants.load("metrics", name).score
    scored: Scores = score(REFERENCES, CANDIDATES)
    assert scored.per_image.shape == (3, len(scored.names))
    assert list(scored.corpus) == list(scored.names)
    order = [2, 0, 1]
    shuffled = score([REFERENCES[i] for i in order], [CANDIDATES[i] for i in order])
    assert _close(shuffled.per_image, scored.per_image[order])
    assert _close(list(shuffled.corpus.values()), list(scored.corpus.values()))
    silent = score(REFERENCES, ["", *CANDIDATES[1:]])
    assert np.isfinite(silent.per_image).all()
    with pytest.raises(DataError, match="2 candidate captions for 3 images"):
        score(REFERENCES, CANDIDATES[:2])
    with pytest.raises(DataError, match="image 1 has no reference"):
        score([REFERENCES[0], [], REFERENCES[2]], CANDIDATES)
