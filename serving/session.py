"""The two graphs of a bundle under ONNX Runtime.

Caches and image memory are OrtValues that stay where the graphs run; what crosses over at each step
are the token ids and beam indices of the rows and their best continuations.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt
import onnxruntime as ort

from exports.manifest import Manifest
from serving.beam import Floats, Ints
from serving.errors import BundleRejected

Provider = Literal["auto", "cpu", "cuda"]
Pixels = npt.NDArray[np.uint8]

_FED = ("token_ids", "position", "beam_index", "top_k")
_ANSWERED = ("log_probs", "ids")
_CUDA_OPTIONS = {
    "cudnn_conv_algo_search": "HEURISTIC",  # a search at every new batch size takes seconds
    "use_tf32": "0",  # ten bits of mantissa would change captions
}


class Observer(Protocol):
    """Is told how long the graphs took."""

    def observe_encode(self, seconds: float) -> None:
        """One run of the encoder."""

    def observe_step(self, seconds: float) -> None:
        """One run of the decoder."""


@dataclass(frozen=True, slots=True)
class Memory:
    """What the decoder attends to: per layer keys and values (B, Hh, N, Dh), on the device."""

    images: int
    values: tuple[ort.OrtValue, ...]


class OnnxSession:
    """A loaded bundle: `encode` images, then `start` to decode them."""

    def __init__(
        self,
        encoder: bytes,
        decoder: bytes,
        manifest: Manifest,
        *,
        threads: int,
        provider: Provider = "cpu",
    ) -> None:
        """Loads both graphs.

        Args:
            encoder: An ONNX file's bytes.
            decoder: An ONNX file's bytes.
            manifest: Names the tensors of both.
            threads: CPU threads that share the work of one run.
            provider: Where the graphs run; `auto` takes CUDA if this ONNX Runtime has it.

        Raises:
            BundleRejected: The graphs lack tensors that the manifest names, or have more; or CUDA
                is asked for and is not there. ONNX Runtime raises errors of its own besides.
        """
        self.manifest = manifest
        self.device = _device(provider)
        self._encoder = _load(encoder, threads, self.device, shapes_repeat=True)
        self._decoder = _load(decoder, threads, self.device, shapes_repeat=False)
        spec = manifest.decoder
        _check("the encoder", self._encoder, (manifest.encoder.input,), manifest.encoder.outputs)
        _check(
            "the decoder",
            self._decoder,
            (*_FED, *spec.past, *spec.memory),
            (*_ANSWERED, *spec.present),
        )

    def encode(self, pixels: Pixels, observer: Observer | None = None) -> Memory:
        """Returns the memory of images, uint8 (B, H, W, 3)."""
        binding = self._encoder.io_binding()
        binding.bind_cpu_input(self.manifest.encoder.input, np.ascontiguousarray(pixels))
        for name in self.manifest.decoder.memory:
            binding.bind_output(name, self.device)
        started = perf_counter()
        self._encoder.run_with_iobinding(binding)
        binding.synchronize_outputs()
        if observer is not None:
            observer.observe_encode(perf_counter() - started)
        return Memory(len(pixels), tuple(binding.get_outputs()))

    def start(self, memory: Memory, observer: Observer | None = None) -> "Decoding":
        """Returns a decoder at the first position. It owns `memory` from here on and changes it."""
        return Decoding(self._decoder, self.manifest, self.device, memory, observer)


class Decoding:
    """A StepModel: one batch of images on its way through the decoder graph."""

    def __init__(
        self,
        session: ort.InferenceSession,
        manifest: Manifest,
        device: str,
        memory: Memory,
        observer: Observer | None,
    ) -> None:
        """Use `OnnxSession.start`."""
        self.bos_id = manifest.text.bos_id
        self.eos_id = manifest.text.eos_id
        self.vocab_size = manifest.text.vocab_size
        self.max_length = manifest.text.max_length
        self._session = session
        self._spec = manifest.decoder
        self._device = device
        self._observer = observer
        self._binding = session.io_binding()
        self._position = 0
        self._memory = memory.values
        self._memory_on_host: list[npt.NDArray[np.float32]] = []
        self._bind(self._spec.memory, self._memory)
        self._caches: Sequence[ort.OrtValue] = ()

    def step(
        self, token_ids: Ints, beam_index: Ints, top_k: int, images: Ints | None
    ) -> tuple[Floats, Ints]:
        """Feeds one token to each row; see `StepModel.step`."""
        if images is not None:
            self._keep(images)
        if self._position == 0:
            self._caches = self._empty_caches(len(token_ids))
        binding = self._binding
        self._bind(self._spec.past, self._caches)
        binding.bind_cpu_input("token_ids", token_ids)
        binding.bind_cpu_input("position", np.array(self._position, dtype=np.int64))
        binding.bind_cpu_input("beam_index", beam_index)
        binding.bind_cpu_input("top_k", np.array([top_k], dtype=np.int64))
        # Bound anew at each step: an output that has a value is written in place, at its old shape.
        binding.clear_binding_outputs()
        for name in _ANSWERED:
            binding.bind_output(name, "cpu")
        for name in self._spec.present:
            binding.bind_output(name, self._device)

        started = perf_counter()
        self._session.run_with_iobinding(binding)
        binding.synchronize_outputs()
        log_probs, ids, *self._caches = binding.get_outputs()
        if self._observer is not None:
            self._observer.observe_step(perf_counter() - started)
        self._position += 1
        return log_probs.numpy(), ids.numpy()

    def _bind(self, names: Sequence[str], values: Sequence[ort.OrtValue]) -> None:
        for name, value in zip(names, values, strict=True):
            self._binding.bind_ortvalue_input(name, value)

    def _empty_caches(self, rows: int) -> list[ort.OrtValue]:
        empty = np.empty((rows, self._spec.heads, 0, self._spec.head_dim), dtype=np.float32)
        value = ort.OrtValue.ortvalue_from_numpy(empty, self._device)
        return [value] * len(self._spec.past)

    def _keep(self, images: Ints) -> None:
        """Compacts the memory to `images` (B,).

        In place: on a CPU `numpy()` is a view, and only images that change their place are copied.
        """
        if not self._memory_on_host:
            self._memory_on_host = [value.numpy() for value in self._memory]
        moved = np.flatnonzero(images != np.arange(images.size))
        for array in self._memory_on_host:
            array[moved] = array[images[moved]]
        self._memory = tuple(
            ort.OrtValue.ortvalue_from_numpy(array[: images.size], self._device)
            for array in self._memory_on_host
        )
        self._bind(self._spec.memory, self._memory)


def _device(provider: Provider) -> str:
    available = ort.get_available_providers()
    if provider == "cuda" and "CUDAExecutionProvider" not in available:
        raise BundleRejected(f"no CUDA here: this ONNX Runtime has {', '.join(available)}")
    if provider == "auto":
        return "cuda" if "CUDAExecutionProvider" in available else "cpu"
    return provider


def _load(graph: bytes, threads: int, device: str, *, shapes_repeat: bool) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.log_severity_level = 4  # failures reach us as exceptions
    # Within a run threads spin for an instant, since waking one takes as long as a small operator.
    # Between runs they sleep: two sessions, the event loop and the image decoders share the cores.
    options.add_session_config_entry("session.intra_op.allow_spinning", "1")
    options.add_session_config_entry("session.intra_op.spin_duration_us", "50")
    options.add_session_config_entry("session.force_spinning_stop", "1")
    # One memory plan is kept for every combination of shapes: of no use where caches grow.
    options.enable_mem_pattern = shapes_repeat
    providers: list[Any] = ["CPUExecutionProvider"]
    if device == "cuda":
        providers.insert(0, ("CUDAExecutionProvider", _CUDA_OPTIONS))
    session = ort.InferenceSession(graph, options, providers=providers)
    if device == "cuda" and session.get_providers()[0] != "CUDAExecutionProvider":
        raise BundleRejected("ONNX Runtime has CUDA but could not start it: no GPU, or no cuDNN")
    return session


def _check(
    what: str, session: ort.InferenceSession, inputs: Sequence[str], outputs: Sequence[str]
) -> None:
    for kind, named, has in (
        ("inputs", inputs, session.get_inputs()),
        ("outputs", outputs, session.get_outputs()),
    ):
        found = {tensor.name for tensor in has}
        if found != set(named):
            raise BundleRejected(f"{what} has the {kind} {sorted(found)}, not {sorted(named)}")
