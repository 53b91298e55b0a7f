"""CTranslate2 (https://github.com/OpenNMT/CTranslate2) as a contender for the decoder alone.

The same weights and the same image tokens, already encoded, in float32 or in CTranslate2's int8. It
is told the places of images in an array of memories that it got beforehand, and tells the captions
and how long it was inside `translate_batch`: no pipe counts. That time includes the projection of
the memory to the keys and values of cross-attention, which this project's encoder graph does.
"""

import json
import os
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from common import UsageError
from environments import PEERS, python_with
from numpy.typing import NDArray

from exports.manifest import Generation
from trainer.captioner import Captioner
from trainer.decoders import gpt2

REQUIREMENT = "ctranslate2==4.8.5"
TRIES = 4  # of every set of knobs on the first batch of a size; the first one warms up
_WORKER = Path(__file__).with_name("ctranslate2_worker.py")
_DEFAULT = "default instructions"
_AVX512 = {"avx512f", "avx512cd", "avx512vl", "avx512bw", "avx512dq"}

Floats = NDArray[np.float32]
Ids = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Setting:
    """How captions are searched for.

    Attributes:
        name: As it stands in the table.
        generation: The beam search; both sides take it.
        patience: CTranslate2 ends an image's search at `patience * num_beams` finished captions,
            whatever the live beams promise; ours goes on while one of them could still win.
    """

    name: str
    generation: Generation
    patience: float = 1.0


@dataclass(frozen=True, slots=True)
class Decoded:
    """Captions without bos, in the order of the places asked for, and the seconds they took."""

    ids: list[Ids]
    seconds: float


Decode = Callable[[Sequence[int], int, Setting], Decoded]
"""Captions the images at some places of the memory, by batches of the given size."""


@dataclass(slots=True)
class DecoderSide:
    """One way to decode, and what was measured of it: seconds and captions, round by round."""

    name: str
    decode: Decode
    seconds: list[float] = field(default_factory=list)
    found: list[Ids] = field(default_factory=list)


class CTranslate2:
    """The decoder and n images' memory in processes of CTranslate2, one for each set of knobs.

    `decode` tries every set on the first batch of a size and keeps to the fastest for that size.

    Args:
        captioner: its decoder is GPT-2.
        memory: (n, N, D), `Captioner.encode` of n images.
        compute_type: `float32`, `int8`, or another of CTranslate2's.
        threads: at most; one thread is tried as well.
        stack: closes the processes.
        python: that has CTranslate2; by default the peer's own environment.

    Raises:
        UsageError: no such decoder, or CTranslate2 could not be installed or started.
    """

    def __init__(
        self,
        captioner: Captioner,
        memory: Floats,
        *,
        compute_type: str,
        threads: int,
        stack: ExitStack,
        python: Path | None = None,
    ) -> None:
        python = python or python_with([REQUIREMENT], PEERS / "ctranslate2")
        self._fastest: dict[int, _Worker] = {}
        with tempfile.TemporaryDirectory() as folder:
            arrays = Path(folder) / "arrays.npz"
            np.savez(arrays, **_arrays(captioner, memory))
            self._workers = [
                stack.enter_context(_Worker(python, arrays, compute_type, count, isa))
                for count, isa in product(sorted({1, threads}), _instruction_sets())
            ]

    def decode(self, places: Sequence[int], batch: int, setting: Setting) -> Decoded:
        """See `Decode`."""
        if batch not in self._fastest:
            seconds: dict[_Worker, list[float]] = {worker: [] for worker in self._workers}
            for _ in range(TRIES):  # in turns, so that what else the machine does hits all
                for worker in self._workers:
                    tried = self._ask(worker, places[:batch], batch, setting)
                    seconds[worker].append(tried.seconds)
            self._fastest[batch] = min(self._workers, key=lambda worker: min(seconds[worker]))
        return self._ask(self._fastest[batch], places, batch, setting)

    def knobs(self, batch: int) -> str:
        """Returns what was fastest for batches of this size."""
        return self._fastest[batch].name

    def log_probs(self, places: Sequence[int], captions: Sequence[Ids]) -> list[list[float]]:
        """Returns every token's log-probability; the captions have neither bos nor eos.

        Each list has one entry more than its caption: the end token's.
        """
        said = self._workers[0].ask({"places": [*places], "captions": [*captions]})
        log_probs: list[list[float]] = said["log_probs"]
        return log_probs

    def _ask(
        self, worker: "_Worker", places: Sequence[int], batch: int, setting: Setting
    ) -> Decoded:
        generation = setting.generation
        options = {
            "beam_size": generation.num_beams,
            "patience": setting.patience,
            "min_decoding_length": generation.min_new_tokens,
            "max_decoding_length": generation.max_new_tokens,
            "length_penalty": generation.length_penalty,
            "no_repeat_ngram_size": generation.no_repeat_ngram_size,
        }
        said = worker.ask({"places": [*places], "batch": batch, "options": options})
        return Decoded([tuple(ids) for ids in said["ids"]], said["seconds"])


class _Worker:
    """A process of `ctranslate2_worker.py`."""

    def __init__(
        self, python: Path, arrays: Path, compute_type: str, threads: int, isa: str
    ) -> None:
        self.name = f"{threads} thread{'s' * (threads > 1)}, {isa}"
        self._process = subprocess.Popen(
            [python, "-I", _WORKER, arrays, compute_type, str(threads)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | ({} if isa == _DEFAULT else {"CT2_FORCE_CPU_ISA": isa}),
        )
        try:
            self._answer()
        except UsageError:
            self.__exit__()
            raise

    def __enter__(self) -> "_Worker":
        return self

    def __exit__(self, *_: object) -> None:
        self._process.communicate()  # closes its stdin, which ends it

    def ask(self, asked: dict[str, Any]) -> Any:
        """Returns the answer to one request."""
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):  # the process is gone; its stderr says why
            print(json.dumps(asked), file=self._process.stdin, flush=True)
        return self._answer()

    def _answer(self) -> Any:
        assert self._process.stdout is not None
        assert self._process.stderr is not None
        line = self._process.stdout.readline()
        if not line:
            said = ["no word from it", *self._process.stderr.read().strip().splitlines()]
            raise UsageError(f"CTranslate2 ({self.name}) gave up: {said[-1]}")
        return json.loads(line)


def _instruction_sets() -> list[str]:
    """Returns what to try: left to itself, CTranslate2 uses AVX2 where AVX-512 is there too."""
    info = Path("/proc/cpuinfo")
    flags = set(info.read_text(encoding="utf-8").split()) if info.exists() else set()
    return [_DEFAULT, "AVX512"] if flags >= _AVX512 else [_DEFAULT]


def _arrays(captioner: Captioner, memory: Floats) -> dict[str, Any]:
    """Returns what the worker reads; the names of the weights are those of `transformers`."""
    decoder, text = captioner.decoder, captioner.text
    if not isinstance(decoder, gpt2.Decoder):
        raise UsageError("only the decoder `gpt2` is translated to CTranslate2")
    shape = {
        "layers": decoder.layers,
        "heads": decoder.heads,
        "bos": text.bos_id,
        "eos": text.eos_id,
        "epsilon": decoder.model.config.layer_norm_epsilon,
    }
    weights = {name: value.numpy() for name, value in decoder.model.state_dict().items()}
    return {**weights, "memory": memory, "shape": json.dumps(shape)}
