"""Training a tokenizer on one's own captions, in any language."""

from collections.abc import Iterable

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from exports.text import TextSpec

SPECIALS = ("<pad>", "<bos>", "<eos>")


def train_tokenizer(
    captions: Iterable[str], *, vocab_size: int, max_length: int
) -> tuple[bytes, TextSpec]:
    """Returns a `tokenizer.json` and its TextSpec: byte-level BPE on lower-cased words.

    Punctuation is dropped, but for an apostrophe inside a word. Bytes are the
    alphabet, so no text is unknown, whatever its script (Sennrich et al., 2016,
    https://arxiv.org/abs/1508.07909; bytes: Radford et al., 2019).

    Args:
        captions: the training captions.
        vocab_size: the most tokens; few captions give fewer.
        max_length: positions of the decoder.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Sequence(
        [
            normalizers.NFC(),
            normalizers.Lowercase(),
            normalizers.Replace("\u2019", "'"),
            normalizers.Replace(Regex(r"(?<=\w) '(?=(s|t|re|ve|ll|d|m)\b)"), "'"),  # dog 's
            normalizers.Replace(Regex(r"(?<!\w)'|'(?!\w)|[^\w\s']|_"), " "),
            normalizers.Replace(Regex(r"\s+"), " "),
            normalizers.Strip(),
        ]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIALS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        # A word that occurs once is whole too, where there is room: a captioner of few captions
        # would string its pieces together into words that there are not.
        min_frequency=1,
        show_progress=False,
    )
    tokenizer.train_from_iterator(captions, trainer)
    spec = TextSpec(
        vocab_size=tokenizer.get_vocab_size(), pad_id=0, bos_id=1, eos_id=2, max_length=max_length
    )
    return tokenizer.to_str().encode(), spec
