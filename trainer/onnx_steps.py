"""The exported graphs as the trainer runs them: plainly, for parity checks and evaluation."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from exports.manifest import DecoderSpec, EncoderSpec, MatcherSpec, next_name
from exports.text import TextSpec


class OnnxSteps:
    """Graphs as a `trainer.decoding.StepModel`, and with a matcher as a `MatchModel`.

    Args:
        encoder: the encoder graph's bytes; `decoder`: the decode step's.
        encoder_spec: its tensor names; `decoder_spec` likewise.
        text: vocabulary and special ids.
        matcher: the matcher graph's bytes, if there is one; `matcher_spec`: its tensor names.
    """

    def __init__(
        self,
        encoder: bytes,
        decoder: bytes,
        encoder_spec: EncoderSpec,
        decoder_spec: DecoderSpec,
        text: TextSpec,
        matcher: bytes | None = None,
        matcher_spec: MatcherSpec | None = None,
    ) -> None:
        self._encoder = session(encoder)
        self._matcher: Any = None if matcher is None else session(matcher)
        self._matcher_spec = matcher_spec
        self.decoder: Any = session(decoder)
        self._encoder_spec, self._spec = encoder_spec, decoder_spec
        inputs = {tensor.name for tensor in self.decoder.get_inputs()}
        self._asks_for_positions = "node_position" in inputs
        self.bos_id, self.eos_id = text.bos_id, text.eos_id
        self.vocab_size, self.max_length = text.vocab_size, text.max_length

    def encode(self, images: NDArray[np.uint8]) -> dict[str, NDArray[np.float32]]:
        """See `StepModel`."""
        names = list(self._encoder_spec.outputs)
        found = self._encoder.run(names, {self._encoder_spec.input: images})
        return dict(zip(names, found, strict=True))

    def start(self, images: NDArray[np.uint8]) -> Any:
        """See `StepModel`."""
        encoded = self.encode(images)
        memory = {name: encoded[name] for name in self._spec.memory}
        shape = (len(images), self._spec.heads, 0, self._spec.head_dim)
        cache = [np.zeros(shape, self._spec.dtype) for _ in self._spec.cache]
        return memory, cache, np.zeros((len(images), 1, 1, 0), np.float32), np.zeros(0, np.int64)

    def step(
        self, state: Any, token_ids: Sequence[int], beam_index: Sequence[int], top_k: int
    ) -> tuple[Any, NDArray[np.float32], NDArray[np.int64]]:
        """See `StepModel`. Every row of every step has a node of its own; none is used again."""
        memory, cache, seen, positions = state
        images, rows = len(seen), len(token_ids)
        columns, nodes = rows // images, seen.shape[3]
        slot, column = np.divmod(np.arange(rows), columns)
        parents = (np.array(beam_index) % seen.shape[2]).reshape(images, columns)
        old = seen[np.arange(images)[:, None], 0, parents]  # (B, W, N)
        new = np.where(np.eye(columns, dtype=bool), np.float32(0), np.float32(-np.inf))
        new = np.broadcast_to(new, (images, columns, columns))
        visible = np.concatenate([old, new], axis=2)[:, None]
        write = np.broadcast_arrays(
            slot[:, None], np.arange(self._spec.heads), (nodes + column)[:, None]
        )
        room = ((0, 0), (0, 0), (0, columns), (0, 0))
        position = positions[-1] + 1 if nodes else 0
        positions = np.concatenate([positions, np.full(columns, position)])
        feeds = {
            "token_ids": np.array(token_ids, np.int64),
            "position": np.full(rows, position, np.int64),
            "write": np.stack(write, axis=2),
            "row_cell": np.stack([slot, column], axis=1),
            "cell_row": np.arange(rows).reshape(images, columns),
            "visible": visible,
            "top_k": np.array([top_k], np.int64),
            **memory,
            **{
                name: np.pad(values, room)
                for name, values in zip(self._spec.cache, cache, strict=True)
            },
        }
        if self._asks_for_positions:
            feeds["node_position"] = np.broadcast_to(positions, (images, nodes + columns))
        log_probs, ids, *cache = self.decoder.run(
            ["log_probs", "ids", *map(next_name, self._spec.cache)], feeds
        )
        return (memory, cache, visible, positions), log_probs, ids

    def match(
        self,
        encoded: Mapping[str, NDArray[np.float32]],
        token_ids: NDArray[np.int64],
        lengths: NDArray[np.int64],
        image: NDArray[np.int64],
    ) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """See `trainer.reranking.MatchModel`."""
        assert self._matcher_spec is not None
        names = (*self._matcher_spec.memory, self._matcher_spec.image_embedding)
        feeds: dict[str, NDArray[Any]] = {
            "token_ids": token_ids,
            "lengths": lengths,
            "image": image,
        }
        feeds |= {name: encoded[name] for name in names}
        match, similarity = self._matcher.run(["match", "similarity"], feeds)
        return match, similarity


def session(graph: bytes) -> onnxruntime.InferenceSession:
    """Returns a graph, ready to run."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # warnings tell of initializers that folding made needless
    return onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
