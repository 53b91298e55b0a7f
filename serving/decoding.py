"""The decoder graph over arenas: a `StepModel` whose caches are changed in place.

The encoded images and the keys and values of all beams have a place for each slot. A step binds the
first slots of each arena, as input and as output; what crosses over are a few numbers a row.
"""

from collections import OrderedDict
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from time import perf_counter
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import onnxruntime as ort

from exports.manifest import Manifest, encoded_name, next_name
from serving.step_model import Floats, Ints, Rows

FED = ("token_ids", "position", "write", "row_cell", "cell_row", "visible", "top_k")
FED_IF_ASKED = "node_position"
ANSWERED = ("log_probs", "ids")
_SHAPES = 64  # of steps, whose bindings are kept
_BYTES = {"tensor(float)": 4, "tensor(float16)": 2}


class Observer(Protocol):
    """Is told how long the graphs took, and what they were spared."""

    def observe_encode(self, seconds: float) -> None:
        """One run of the encoder."""

    def add_repeats(self, images: int) -> None:
        """Images whose encoding was kept."""

    def observe_step(self, seconds: float) -> None:
        """One run of the decoder."""

    def observe_match(self, seconds: float) -> None:
        """One run of the matcher."""


@dataclass(frozen=True, slots=True)
class Memory:
    """What the encoder gives of images, on the device.

    `values`, each (B, ...), are what the decoder attends to beside the text, in the manifest's
    order; `image_embedding` (B, E) is there for the matcher, if there is one. `distances` are each
    image's from the training images, and whether that is far, if the bundle can tell.
    """

    images: int
    values: tuple[ort.OrtValue, ...]
    image_embedding: ort.OrtValue | None = None
    distances: tuple[tuple[float, bool], ...] = ()

    @property
    def size(self) -> int:
        """Bytes."""
        kept = self.values if self.image_embedding is None else (*self.values, self.image_embedding)
        return sum(_BYTES[value.data_type()] * int(np.prod(value.shape())) for value in kept)


class Decoding:
    """A StepModel over the decoder graph. For one thread at a time."""

    def __init__(
        self,
        session: ort.InferenceSession,
        join: ort.InferenceSession,
        manifest: Manifest,
        device: str,
        *,
        turn: AbstractContextManager[Any],
        slots: int,
    ) -> None:
        """Use `OnnxSession.decoding`."""
        text, spec = manifest.text, manifest.decoder
        self.bos_id, self.eos_id = text.bos_id, text.eos_id
        self.vocab_size, self.max_length = text.vocab_size, text.max_length
        self.observer: Observer | None = None
        self._session, self._join = session, join
        self._spec, self._device, self._turn = spec, device, turn
        # On a device, what is fed is copied there when it is bound, so at every step anew.
        self._feeds_by_copy = device != "cpu"
        self._bound: OrderedDict[tuple[int, ...], _Bound] = OrderedDict()  # used last is last
        self._joining = join.io_binding()
        self._joined: Memory | None = None  # what `_joining` has bound
        self._dtype = np.dtype(spec.dtype)
        inputs = {tensor.name: tensor for tensor in session.get_inputs()}
        self._wants_positions = FED_IF_ASKED in inputs
        self._memory = {name: self._arena(slots, *inputs[name].shape[1:]) for name in spec.memory}
        self._cache = {
            name: self._arena(slots, spec.heads, 0, spec.head_dim) for name in spec.cache
        }
        for name, arena in self._memory.items():
            self._joining.bind_ortvalue_input(name, arena)
            self._joining.bind_ortvalue_output(next_name(name), arena)

    def place(self, memory: Memory, source: Sequence[int], slots: Sequence[int]) -> None:
        """Copies images of an encoded batch, by their places in it, into slots."""
        binding = self._joining
        binding.bind_cpu_input("source", np.array(source, dtype=np.int64))
        binding.bind_cpu_input("slot", np.array(slots, dtype=np.int64)[:, None])
        if memory is not self._joined:
            for name, value in zip(self._memory, memory.values, strict=True):
                binding.bind_ortvalue_input(encoded_name(name), value)
        self._join.run_with_iobinding(binding)
        if self._feeds_by_copy:
            binding.synchronize_outputs()
        self._joined = memory

    def step(self, rows: Rows, top_k: int) -> tuple[Floats, Ints]:
        """Feeds one token to each row; see `StepModel`. The next step overwrites the answer."""
        count = len(rows.slot)
        slots, width, nodes = rows.visible.shape
        # Two at least: a product with one row takes another kernel, which rounds otherwise.
        shape = (max(count, 2), slots, width, nodes, top_k)
        bound = self._bound.get(shape) or self._bind(shape)
        self._bound.move_to_end(shape)
        bound.feed(rows)
        with self._turn:
            started = perf_counter()
            self._session.run_with_iobinding(bound.binding)
            if self._feeds_by_copy:
                bound.binding.synchronize_outputs()
            seconds = perf_counter() - started
        if self.observer is not None:
            self.observer.observe_step(seconds)
        return bound.log_probs[:count], bound.ids[:count]

    def clear(self, slot: int) -> None:
        """See `StepModel`. Rare, so the arenas go to the host and back."""
        for arena in (*self._memory.values(), *self._cache.values()):
            values = arena.numpy()
            values[slot] = 0
            arena.update_inplace(values)

    def _arena(self, *shape: int) -> ort.OrtValue:
        """Returns zeros; on a CPU no page of them is taken before it is written."""
        return ort.OrtValue.ortvalue_from_numpy(np.zeros(shape, self._dtype), self._device)

    def _grow(self, nodes: int) -> None:
        """Makes room for more nodes in every slot."""
        for name, arena in self._cache.items():
            old = arena.numpy()
            new = np.zeros((*old.shape[:2], nodes, old.shape[3]), self._dtype)
            new[:, :, : old.shape[2]] = old
            self._cache[name] = ort.OrtValue.ortvalue_from_numpy(new, self._device)

    def _bind(self, shape: tuple[int, ...]) -> "_Bound":
        """Binds arenas and buffers for steps of one shape, and keeps that for the next time."""
        count, slots, width, nodes, top_k = shape
        if nodes != next(iter(self._cache.values())).shape()[2]:
            self._bound.clear()
            self._grow(nodes)
        binding = self._session.io_binding()
        for name, arena in (*self._memory.items(), *self._cache.items()):
            # The first slots of the arena, which are as good as an arena of so many.
            place = (self._device, 0, self._dtype, (slots, *arena.shape()[1:]), arena.data_ptr())
            binding.bind_input(name, *place)
            if name in self._cache:
                binding.bind_output(next_name(name), *place)
        whole = np.int64
        fed: dict[str, npt.NDArray[Any]] = {
            "token_ids": np.zeros(count, whole),
            "position": np.zeros(count, whole),
            "write": np.zeros((count, self._spec.heads, 3), whole),
            "row_cell": np.zeros((count, 2), whole),
            "cell_row": np.zeros((slots, width), whole),
            "visible": np.zeros((slots, 1, width, nodes), np.float32),
            "top_k": np.array([top_k], whole),
        }
        fed["write"][:, :, 1] = np.arange(self._spec.heads)
        if self._wants_positions:
            fed[FED_IF_ASKED] = np.zeros((slots, nodes), whole)
        bound = self._bound[shape] = _Bound(binding, fed, top_k, by_copy=self._feeds_by_copy)
        if len(self._bound) > _SHAPES:
            self._bound.popitem(last=False)
        return bound


class _Bound:
    """Everything bound for steps of one shape."""

    def __init__(
        self,
        binding: ort.IOBinding,
        fed: dict[str, npt.NDArray[Any]],
        top_k: int,
        *,
        by_copy: bool,
    ) -> None:
        self.binding = binding
        self._fed, self._by_copy = fed, by_copy
        self._slot: Ints | None = None  # of the rows that were fed last
        count = len(fed["token_ids"])
        self.log_probs = np.zeros((count, top_k), np.float32)
        self.ids = np.zeros((count, top_k), np.int64)
        for name, array in fed.items():
            binding.bind_ortvalue_input(name, ort.OrtValue.ortvalue_from_numpy(array))
        for name, answer in zip(ANSWERED, (self.log_probs, self.ids), strict=True):
            binding.bind_ortvalue_output(name, ort.OrtValue.ortvalue_from_numpy(answer))

    def feed(self, rows: Rows) -> None:
        """Writes rows to the bound arrays."""
        fed, count = self._fed, len(rows.slot)
        if rows.slot is not self._slot:  # else these stand as before
            self._slot = rows.slot
            fed["write"][:count, :, 0] = rows.slot[:, None]
            fed["row_cell"][:count, 0] = rows.slot
            fed["row_cell"][:count, 1] = rows.column
            fed["cell_row"][rows.slot, rows.column] = np.arange(count)
        fed["token_ids"][:count] = rows.token_ids
        fed["position"][:count] = rows.position
        fed["write"][:count, :, 2] = rows.node[:, None]
        fed["visible"][:, 0] = rows.visible
        if FED_IF_ASKED in fed:
            fed[FED_IF_ASKED][:] = rows.node_position
        if count == 1:  # a twin, which writes the same to the same place
            for name in ("token_ids", "position", "write", "row_cell"):
                fed[name][1] = fed[name][0]
        if self._by_copy:
            for name, array in fed.items():
                self.binding.bind_cpu_input(name, array)
