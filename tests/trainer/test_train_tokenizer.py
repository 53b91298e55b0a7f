"""Tokenizers trained on captions."""

import pytest

from exports.text import Tokenizer
from trainer.tokenizer import train_tokenizer

CAPTIONS = [
    "A dog 's ball lies in the grass .",
    "Two children aren't looking , they run !",
    "The man's T-shirt is red .",
] * 3


def trained(captions, vocab_size=400):
    body, spec = train_tokenizer(captions, vocab_size=vocab_size, max_length=40)
    return Tokenizer(body, spec), spec


@pytest.mark.parametrize(
    ("written", "told"),
    [
        ("A dog 's ball.", "a dog's ball"),
        ("the dog\u2019s  ball", "the dog's ball"),
        ("Two 'big' children, running!", "two big children running"),
        ("they aren't", "they aren't"),
        ("a T-shirt", "a t shirt"),
    ],
)
def test_words_come_back_lower_case_without_punctuation(written: str, told: str) -> None:
    tokenizer, _ = trained(CAPTIONS)
    assert tokenizer.decode(tokenizer.encode(written)) == told


@pytest.mark.parametrize(
    "text", ["孩子们在草地上跑", "बच्चे घास पर दौड़ते हैं", "дети бегут по траве", "🐕 run"]
)
def test_no_script_is_unknown(text: str) -> None:
    for captions in (CAPTIONS, [text] * 3):
        tokenizer, _ = trained(captions)
        assert tokenizer.decode(tokenizer.encode(text)) == text.replace("🐕 ", "")


def test_frequent_words_become_one_token_and_the_vocabulary_is_bounded() -> None:
    tokenizer, spec = trained(CAPTIONS, vocab_size=300)
    assert spec.vocab_size == 300 and max(tokenizer.encode("a dog's grass")) < 300
    tokenizer, spec = trained(["the big dog"] * 9, vocab_size=5000)
    assert spec.vocab_size < 300 and len(tokenizer.encode("the big dog")) == 3


def test_a_word_that_occurs_once_is_one_token_where_there_is_room() -> None:
    tokenizer, _ = trained(["a saxophonist plays", "a dog"], vocab_size=400)
    assert len(tokenizer.encode("a saxophonist plays")) == 3
