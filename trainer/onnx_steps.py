"""The exported graphs as the trainer runs them: plainly, for parity checks and evaluation."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from exports.manifest import DecoderSpec, EncoderSpec
from exports.text import TextSpec


class OnnxSteps:
    """Two graphs as a `trainer.decoding.StepModel`.

    Args:
        encoder: the encoder graph's bytes; `decoder`: the decode step's.
        encoder_spec: its tensor names; `decoder_spec` likewise.
        text: vocabulary and special ids.
    """

    def __init__(
        self,
        encoder: bytes,
        decoder: bytes,
        encoder_spec: EncoderSpec,
        decoder_spec: DecoderSpec,
        text: TextSpec,
    ) -> None:
        self._encoder = _session(encoder)
        self._decoder = _session(decoder)
        self._encoder_spec, self._spec = encoder_spec, decoder_spec
        self.bos_id, self.eos_id = text.bos_id, text.eos_id
        self.vocab_size, self.max_length = text.vocab_size, text.max_length

    def encode(self, images: NDArray[np.uint8]) -> list[NDArray[np.float32]]:
        """Returns the memory of images (B, H, W, 3), each array (B, heads, N, head_dim)."""
        names = list(self._encoder_spec.outputs)
        return list(self._encoder.run(names, {self._encoder_spec.input: images}))

    def start(self, images: NDArray[np.uint8]) -> Any:
        """See `StepModel`."""
        shape = (len(images), self._spec.heads, 0, self._spec.head_dim)
        return self.encode(images), [np.zeros(shape, np.float32) for _ in self._spec.past]

    def step(
        self, state: Any, token_ids: Sequence[int], beam_index: Sequence[int], top_k: int
    ) -> tuple[Any, NDArray[np.float32], NDArray[np.int64]]:
        """See `StepModel`."""
        memory, past = state
        feeds = {
            "token_ids": np.array(token_ids, np.int64),
            "position": np.array(past[0].shape[2], np.int64),
            "beam_index": np.array(beam_index, np.int64),
            "top_k": np.array([top_k], np.int64),
            **dict(zip(self._spec.memory, memory, strict=True)),
            **dict(zip(self._spec.past, past, strict=True)),
        }
        log_probs, ids, *present = self._decoder.run(
            ["log_probs", "ids", *self._spec.present], feeds
        )
        return (memory, present), log_probs, ids


def _session(graph: bytes) -> onnxruntime.InferenceSession:
    return onnxruntime.InferenceSession(graph, providers=["CPUExecutionProvider"])
