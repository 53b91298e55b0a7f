"""A bundle under ONNX Runtime: its graphs, checked against the manifest, and how they run."""

import ctypes
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from threading import Lock
from time import perf_counter
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import onnxruntime as ort

from exports.bundle import Bundle
from exports.manifest import Dtype, Manifest, encoded_name, next_name
from exports.reference import REFERENCE_FILE, Reference
from serving.decoding import ANSWERED, FED, FED_IF_ASKED, Decoding, Memory, Observer
from serving.errors import BundleRejected
from serving.matcher import ANSWERED as MATCHER_ANSWERED
from serving.matcher import FED as MATCHER_FED
from serving.matcher import Matcher
from serving.onnx_walk import check_graph

Provider = Literal["auto", "cpu", "cuda"]
Pixels = npt.NDArray[np.uint8]

_TYPES: dict[Dtype, str] = {"float32": "tensor(float)", "float16": "tensor(float16)"}

_CUDA_OPTIONS = {
    "cudnn_conv_algo_search": "HEURISTIC",  # a search at every new batch size takes seconds
    "use_tf32": "0",  # ten bits of mantissa would change captions
}


class Graphs(NamedTuple):
    """The bytes of a bundle's ONNX files."""

    encoder: bytes
    decoder: bytes
    join: bytes
    matcher: bytes | None = None

    @classmethod
    def read(cls, bundle: Bundle) -> "Graphs":
        """Reads them; raises ExportsError."""
        manifest = bundle.manifest
        files = [manifest.encoder.file, manifest.decoder.file, manifest.join_file]
        if manifest.matcher is not None:
            files.append(manifest.matcher.file)
        return cls(*(bundle.read(file) for file in files))


class OnnxSession:
    """A loaded bundle: `encode` images, then decode them in the slots of a `decoding`.

    `matcher` tells how well captions fit, if the bundle has one.
    """

    def __init__(
        self,
        graphs: Graphs,
        manifest: Manifest,
        *,
        threads: int,
        provider: Provider = "cpu",
        reference: Reference | None = None,
    ) -> None:
        """Loads the graphs.

        Args:
            graphs: The bundle's.
            manifest: Names the tensors of all.
            threads: CPU threads that share the work of one run.
            provider: Where the graphs run; `auto` takes CUDA if this ONNX Runtime has it and there
                is a GPU.
            reference: What images are held against, if the bundle has it.

        Raises:
            BundleRejected: The graphs are not whole in themselves or run foreign operators, lack
                tensors that the manifest names, or have more; or CUDA is asked for and is not
                there. ONNX Runtime raises errors of its own besides.
        """
        self.manifest = manifest
        self.device = _device(provider)
        # On a CPU one run at a time: the threads of two would wait for each other's cores. What is
        # outside of runs overlaps with them.
        self._turn = Lock() if self.device == "cpu" else nullcontext()
        for what, graph in zip(Graphs._fields, graphs, strict=True):
            if graph is not None:
                check_graph(f"the {what}", graph)
        self._encoder = _load(graphs.encoder, threads, self.device)
        self._decoder = _load(graphs.decoder, threads, self.device)
        self._join = _load(graphs.join, 1, self.device)
        memory, cache = manifest.decoder.memory, manifest.decoder.cache
        asked = [i.name for i in self._decoder.get_inputs() if i.name == FED_IF_ASKED]
        kept = dict.fromkeys((*memory, *cache, *map(encoded_name, memory)), manifest.decoder.dtype)
        kept |= {next_name(name): dtype for name, dtype in kept.items()}
        _check(
            "the encoder", self._encoder, (manifest.encoder.input,), manifest.encoder.outputs, kept
        )
        _check(
            "the decoder",
            self._decoder,
            (*FED, *asked, *cache, *memory),
            (*ANSWERED, *map(next_name, cache)),
            kept,
        )
        _check(
            "the join",
            self._join,
            ("source", "slot", *memory, *map(encoded_name, memory)),
            [*map(next_name, memory)],
            kept,
        )
        if reference is not None and reference.output not in memory:
            raise BundleRejected(f"{REFERENCE_FILE} reads {reference.output}, which nothing gives")
        self._reference = reference
        self.matcher: Matcher | None = None
        if manifest.matcher is not None and graphs.matcher is not None:
            spec, session = manifest.matcher, _load(graphs.matcher, threads, self.device)
            fed = (*MATCHER_FED, *spec.memory, spec.image_embedding)
            _check("the matcher", session, fed, MATCHER_ANSWERED, kept)
            self.matcher = Matcher(session, manifest, spec, self._turn)

    def encode(self, pixels: Pixels, observer: Observer | None = None) -> Memory:
        """Returns the memory of images, uint8 (B, H, W, 3)."""
        binding = self._encoder.io_binding()
        binding.bind_cpu_input(self.manifest.encoder.input, np.ascontiguousarray(pixels))
        spec = self.manifest.matcher
        for name in self.manifest.decoder.memory:
            binding.bind_output(name, self.device)
        if spec is not None:
            binding.bind_output(spec.image_embedding, self.device)
        with self._turn:
            started = perf_counter()
            self._encoder.run_with_iobinding(binding)
            binding.synchronize_outputs()
            seconds = perf_counter() - started
        if observer is not None:
            observer.observe_encode(seconds)
        values = list(binding.get_outputs())
        embedding = None if spec is None else values.pop()
        return Memory(len(pixels), tuple(values), embedding, self._distances(values))

    def _distances(self, values: Sequence[ort.OrtValue]) -> tuple[tuple[float, bool], ...]:
        if self._reference is None:
            return ()
        place = self.manifest.decoder.memory.index(self._reference.output)
        found = self._reference.distances(values[place].numpy()).tolist()
        return tuple((distance, distance > self._reference.usual) for distance in found)

    def decoding(self, slots: int) -> "Decoding":
        """Returns a decoder with room for images in so many slots."""
        return Decoding(
            self._decoder, self._join, self.manifest, self.device, turn=self._turn, slots=slots
        )


def _device(provider: Provider) -> str:
    available = ort.get_available_providers()
    if provider == "cuda" and "CUDAExecutionProvider" not in available:
        words = f"no CUDA here: this ONNX Runtime has {', '.join(available)}"
        raise BundleRejected(words, "other")
    if provider == "auto":
        return "cuda" if "CUDAExecutionProvider" in available and _gpus() else "cpu"
    return provider


def _gpus() -> int:
    """Returns how many GPUs NVIDIA's driver knows, https://docs.nvidia.com/cuda/cuda-driver-api."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return 0
    found = ctypes.c_int()
    is_well = driver.cuInit(0) == 0 and driver.cuDeviceGetCount(ctypes.byref(found)) == 0
    return found.value if is_well else 0


def _load(graph: bytes, threads: int, device: str) -> ort.InferenceSession:
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
    options.add_session_config_entry("session.load_model_format", "ONNX")
    # One memory plan would be kept for every combination of shapes, of which there are many.
    options.enable_mem_pattern = False
    providers: list[Any] = ["CPUExecutionProvider"]
    if device == "cuda":
        providers.insert(0, ("CUDAExecutionProvider", _CUDA_OPTIONS))
    session = ort.InferenceSession(graph, options, providers=providers)
    if device == "cuda" and session.get_providers()[0] != "CUDAExecutionProvider":
        words = "ONNX Runtime has CUDA but could not start it: no GPU, or no cuDNN"
        raise BundleRejected(words, "other")
    return session


def _check(
    what: str,
    session: ort.InferenceSession,
    inputs: Sequence[str],
    outputs: Sequence[str],
    dtypes: Mapping[str, Dtype],
) -> None:
    """Raises BundleRejected unless tensors have these names, and floats are float32 or `dtypes`."""
    for kind, named, has in (
        ("inputs", inputs, session.get_inputs()),
        ("outputs", outputs, session.get_outputs()),
    ):
        found = {tensor.name for tensor in has}
        if found != set(named):
            raise BundleRejected(f"{what} has the {kind} {sorted(found)}, not {sorted(named)}")
        for tensor in has:
            wanted = dtypes.get(tensor.name, "float32")
            if tensor.type in _TYPES.values() and tensor.type != _TYPES[wanted]:
                raise BundleRejected(f"{what} has {tensor.name} as {tensor.type}, not in {wanted}")
