import pytest
from pydantic import ValidationError
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers, trainers

from exports.errors import BundleError
from exports.text import TextSpec, Tokenizer

CAPTION = "a dog runs through the grass"


@pytest.fixture
def tokenizer(tokenizer_json: bytes, text_spec: TextSpec) -> Tokenizer:
    return Tokenizer(tokenizer_json, text_spec)


def test_round_trip_without_padding_truncation_or_specials(tokenizer: Tokenizer) -> None:
    token_ids = tokenizer.encode("A Dog runs THROUGH the grass")  # the normaliser lower-cases

    assert token_ids == [3, 4, 5, 6, 7, 8]
    assert tokenizer.decode(token_ids) == CAPTION
    assert tokenizer.decode([1, *token_ids, 2, 0, 0]) == CAPTION
    assert tokenizer.decode([]) == ""
    assert tokenizer.encode("") == []


def test_a_special_token_in_a_text_is_only_text(tokenizer: Tokenizer, text_spec: TextSpec) -> None:
    token_ids = tokenizer.encode("a dog</s> </s> <s> <pad> runs")

    assert not {text_spec.bos_id, text_spec.eos_id, text_spec.pad_id} & set(token_ids)
    assert token_ids[0] == 3
    assert token_ids[-1] == 5


def test_a_prefix_is_what_a_caption_starts_with(tokenizer: Tokenizer) -> None:
    assert tokenizer.prefix_ids("  a dog ") == tokenizer.encode(CAPTION)[:2]
    assert tokenizer.prefix_ids(" ") == []


def test_ids_outside_of_the_tokenizer_have_no_text(
    tokenizer_json: bytes, text_spec: TextSpec
) -> None:
    padded = text_spec.model_copy(update={"vocab_size": 64})  # graphs round up to a multiple
    assert Tokenizer(tokenizer_json, padded).decode([3, 63, 4]) == "a dog"


@pytest.mark.parametrize("text", [CAPTION, "Ça coûte 3 €, très cher!", "two  spaces", "犬が走る"])
def test_byte_level_bpe_loses_nothing(text: str) -> None:
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator([CAPTION] * 3, trainer)
    spec = TextSpec(vocab_size=300, bos_id=0, eos_id=1, pad_id=1, max_length=64)
    tokenizer = Tokenizer(backend.to_str().encode(), spec)

    assert tokenizer.decode([0, *tokenizer.encode(text), 1]) == text
    start = tokenizer.prefix_ids(f"{text} ")
    assert tokenizer.encode(f"{text} the grass")[: len(start)] == start


@pytest.mark.parametrize("body", [b"", b"{}", b"\xff\xfe", b"[1, 2]"])
def test_what_is_no_tokenizer_is_refused(body: bytes, text_spec: TextSpec) -> None:
    with pytest.raises(BundleError, match=r"tokenizer\.json"):
        Tokenizer(body, text_spec)


def test_a_tokenizer_larger_than_the_vocabulary_is_refused(
    tokenizer_json: bytes, text_spec: TextSpec
) -> None:
    small = text_spec.model_copy(update={"vocab_size": 9})
    with pytest.raises(BundleError, match="token id 9, but vocab_size is 9"):
        Tokenizer(tokenizer_json, small)
    with pytest.raises(ValidationError, match="eos_id is 9"):
        TextSpec(vocab_size=9, bos_id=0, eos_id=9, pad_id=0, max_length=4)
