"""The tokenizer of a bundle: text to token ids and back, on the library `tokenizers`."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, model_validator
from tokenizers import Tokenizer as _Backend

from exports.errors import BundleError


class TextSpec(BaseModel):
    """The token ids that a decoder graph speaks.

    `max_length` is the longest sequence that the decoder accepts, in tokens, with bos and eos.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    vocab_size: int = Field(ge=2)
    bos_id: int = Field(ge=0)
    eos_id: int = Field(ge=0)
    pad_id: int = Field(ge=0)
    max_length: int = Field(ge=2)

    @model_validator(mode="after")
    def _ids_are_in_the_vocabulary(self) -> "TextSpec":
        for name in ("bos_id", "eos_id", "pad_id"):
            if getattr(self, name) >= self.vocab_size:
                raise ValueError(f"{name} is {getattr(self, name)}, outside of vocab_size")
        return self


def framed(
    captions: Sequence[Sequence[int]], spec: TextSpec
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Returns captions as a matcher graph reads them.

    Args:
        captions: what a search gives: ids without bos, with eos unless they were cut.
        spec: whose `max_length` leaves a caption without eos, if it was cut there.

    Returns:
        token_ids (C, T), bos ... eos and padding; lengths (C,), tokens without padding.
    """
    rows = []
    for caption in captions:
        ends = () if caption and caption[-1] == spec.eos_id else (spec.eos_id,)
        rows.append((spec.bos_id, *caption, *ends)[: spec.max_length])
    lengths = np.array([len(row) for row in rows], np.int64)
    token_ids = np.full((len(rows), max(lengths, default=0)), spec.pad_id, np.int64)
    for place, row in enumerate(rows):
        token_ids[place, : len(row)] = row
    return token_ids, lengths


class Tokenizer:
    """Token ids of captions, by a `tokenizer.json`.

    Special tokens written out in a text (`</s>`) are read as ordinary characters or dropped, so
    that no caption and no prefix from outside can smuggle one in.
    """

    def __init__(self, tokenizer_json: bytes, spec: TextSpec) -> None:
        """Reads a tokenizer.

        Raises:
            BundleError: Not a tokenizer, or one with ids that `spec.vocab_size` does not hold.
        """
        try:
            self._backend = _Backend.from_str(tokenizer_json.decode("utf-8"))
        except Exception as error:  # the library raises bare Exception
            raise BundleError(f"tokenizer.json is not a tokenizer: {error}") from error
        largest = max(self._backend.get_vocab(with_added_tokens=True).values(), default=-1)
        if largest >= spec.vocab_size:
            raise BundleError(
                f"tokenizer.json has the token id {largest}, but vocab_size is {spec.vocab_size}"
            )
        self._backend.no_padding()
        self._backend.no_truncation()
        self._backend.encode_special_tokens = True
        self._specials = frozenset((spec.bos_id, spec.eos_id, spec.pad_id))

    def encode(self, text: str) -> list[int]:
        """Returns the token ids of `text`, normalised as tokenizer.json says, without specials."""
        token_ids = self._backend.encode(text, add_special_tokens=False).ids
        return [token_id for token_id in token_ids if token_id not in self._specials]

    def decode(self, token_ids: Sequence[int]) -> str:
        """Returns the text of `token_ids`, stripped; special tokens are left out."""
        words = [int(token_id) for token_id in token_ids if int(token_id) not in self._specials]
        return str(self._backend.decode(words, skip_special_tokens=True)).strip()

    def prefix_ids(self, text: str) -> list[int]:
        """Returns the token ids that a caption starting with `text` is forced to start with."""
        return self.encode(text.strip())
