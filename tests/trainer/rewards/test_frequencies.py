"""Document frequencies of a corpus: counted once, kept, and refused where words do not agree."""

import json
from pathlib import Path

import numpy as np
import pytest
from judged import EXAMPLES

from trainer.errors import CheckpointError, ConfigError, DataError
from trainer.metrics import _words
from trainer.metrics.cider import CiderD
from trainer.rewards import _frequencies
from trainer.rewards._frequencies import count_corpus, keep_frequencies, read_frequencies, rule
from trainer.rewards._reward import marked


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """Captions of images that are not there, an image's on several lines."""
    path = tmp_path / "corpus.jsonl"
    rows = [
        {"image": f"{number}.jpg", "caption": caption}
        for number, example in enumerate([*EXAMPLES, *EXAMPLES])
        for caption in example.captions
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_a_table_is_what_its_corpus_is(corpus: Path, tmp_path: Path) -> None:
    counted = count_corpus(corpus)
    assert counted.images == 6
    table = keep_frequencies(corpus, tmp_path)
    corpus.unlink()
    assert keep_frequencies(corpus, tmp_path) == table, "the corpus is needed no more"
    kept = read_frequencies(table, EXAMPLES)
    assert np.array_equal(kept.numbers, counted.numbers)
    assert np.array_equal(kept.counts, counted.counts) and kept.images == 6
    references = [marked(example.captions) for example in EXAMPLES]
    twice = CiderD(references * 2)  # the same frequencies, from these very captions
    text = "a dog on the street eos"
    assert CiderD(references, frequencies=kept).score(0, text) == twice.score(0, text)


def test_another_rule_for_words_is_noticed(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = keep_frequencies(corpus, tmp_path)
    before = rule()
    monkeypatch.setattr(_frequencies, "END", "")
    assert rule() != before
    with pytest.raises(CheckpointError, match="words were made by another rule"):
        read_frequencies(table, EXAMPLES)
    monkeypatch.undo()
    monkeypatch.setattr(_frequencies, "words", lambda text: _words.words(text.upper())[::-1])
    with pytest.raises(CheckpointError, match="words were made by another rule"):
        read_frequencies(table, EXAMPLES)
    monkeypatch.undo()
    read_frequencies(table, EXAMPLES)


def test_a_corpus_of_other_words_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "corpus.jsonl"
    path.write_text('{"image": "1.jpg", "caption": "ein Hund auf der Wiese"}\n')
    with pytest.raises(ConfigError, match=r"has 4% of the words of the training captions"):
        read_frequencies(path, EXAMPLES)


def test_a_corpus_without_captions_is_named(tmp_path: Path) -> None:
    path = tmp_path / "corpus.jsonl"
    path.write_text('{"image": "1.jpg"}\n')
    with pytest.raises(DataError, match="it holds no caption"):
        count_corpus(path)


def test_a_damaged_table_is_named(corpus: Path, tmp_path: Path) -> None:
    table = keep_frequencies(corpus, tmp_path)
    body = bytearray(table.read_bytes())
    body[-1] ^= 1
    table.write_bytes(body)
    with pytest.raises(CheckpointError, match="damaged"):
        read_frequencies(table, EXAMPLES)
