"""The sides of the benchmarks: this project's engine, and `generate` of transformers."""

import asyncio
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field, fields, replace
from itertools import takewhile
from pathlib import Path

import numpy as np
import torch
from common import check_run
from numpy.typing import NDArray

from exports.bundle import Bundle
from exports.manifest import Generation
from serving.captioner import Captioner as Served
from serving.engine import Engine, EngineMetrics
from serving.errors import CaptionFailed
from serving.params import Caption, Params
from serving.step_model import Floats, Ints, Rows
from trainer.captioner import Captioner
from trainer.compression import round_weights
from trainer.run import Run
from trainer.stages.export import blended

Pixels = NDArray[np.uint8]
Ids = tuple[int, ...]


class Meter(EngineMetrics):
    """Seconds inside the two graphs, and the batches that were made; all else is let pass."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Forgets everything."""
        self.encode = self.step = 0.0
        self.batches: list[int] = []

    def observe_encode(self, seconds: float) -> None:
        """One run of the encoder."""
        self.encode += seconds

    def observe_step(self, seconds: float) -> None:
        """One run of the decoder."""
        self.step += seconds

    def observe_batch(self, images: int) -> None:
        """A batch begins."""
        self.batches.append(images)


@dataclass(slots=True)
class Side:
    """One way to caption, and what was measured of it.

    Attributes:
        name: As it stands in the table.
        caption: Turns pixels (n, H, W, 3) into the ids of n captions, without bos, by batches of
            the given size.
        meter: What the engine tells of itself.
        seconds: One entry a round.
        found: The captions of the last round.
    """

    name: str
    caption: Callable[[Pixels, int], list[Ids]]
    meter: Meter | None = None
    seconds: list[float] = field(default_factory=list)
    found: list[Ids] = field(default_factory=list)


def direct(served: Served, name: str) -> Side:
    """Returns the engine's compute path: batch after batch, on the calling thread."""
    meter, params = Meter(), Params.of(served.manifest.defaults)

    def caption(pixels: Pixels, batch: int) -> list[Ids]:
        found: list[Ids] = []
        for part in _batches(pixels, batch):
            results = served.caption_batch(part, [params] * len(part), observer=meter)
            found += [_best(captions) for captions in results]
        return found

    return Side(name, caption, meter)


def bare(served: Served) -> Side:
    """Returns the graphs with no bookkeeping: runs that a search has made are made again.

    The first time that pixels come, they are captioned and every step's rows are kept; from then on
    encoder, join and steps run on what was kept, and nobody looks at what they give.
    """
    meter, params = Meter(), Params.of(served.manifest.defaults)
    session, decoding = served._session, served._decoding
    kept: dict[tuple[int, int], tuple[list[Ids], list[list[tuple[Rows, int]]]]] = {}

    def record(pixels: Pixels, batch: int) -> tuple[list[Ids], list[list[tuple[Rows, int]]]]:
        plain, steps, found = decoding.step, list[list[tuple[Rows, int]]](), list[Ids]()

        def step(rows: Rows, top_k: int) -> tuple[Floats, Ints]:
            names = (one.name for one in fields(rows))
            copies = {name: getattr(rows, name).copy() for name in names}
            steps[-1].append((Rows(**copies), top_k))
            return plain(rows, top_k)

        decoding.step = step  # type: ignore[method-assign]
        for part in _batches(pixels, batch):
            steps.append([])
            found += [_best(one) for one in served.caption_batch(part, [params] * len(part))]
        decoding.step = plain  # type: ignore[method-assign]
        return found, steps

    def caption(pixels: Pixels, batch: int) -> list[Ids]:
        key = (pixels.ctypes.data, len(pixels))
        if key not in kept:
            kept[key] = record(pixels, batch)
        found, steps = kept[key]
        decoding.observer = meter
        for part, rows_of in zip(_batches(pixels, batch), steps, strict=True):
            decoding.place(session.encode(part, meter), *[range(len(part))] * 2)
            for rows, top_k in rows_of:
                decoding.step(rows, top_k)
        return found

    return Side("its graphs, no bookkeeping", caption, meter)


def greedy(served: Served) -> Side:
    """Returns the engine's compute path with one beam."""
    params = replace(Params.of(served.manifest.defaults), num_beams=1, num_captions=1)

    def caption(pixels: Pixels, batch: int) -> list[Ids]:
        return [
            _best(captions)
            for part in _batches(pixels, batch)
            for captions in served.caption_batch(part, [params] * len(part))
        ]

    return Side("this engine, greedy", caption)


def queued(served: Served, batch: int, runner: asyncio.Runner, stack: ExitStack) -> Side:
    """Returns the whole engine: as many clients as a batch holds, each with one image at a time."""
    meter, params = Meter(), Params.of(served.manifest.defaults)
    rows = batch * params.num_beams
    engine = Engine(max_rows=rows, max_queue=batch, latency_target_s=60.0, metrics=meter)
    stack.callback(engine.close)

    async def client(images: Iterator[tuple[int, Pixels]], found: dict[int, Ids]) -> None:
        for place, image in images:
            found[place] = _best(await engine.submit(served, image, params))

    async def clients(pixels: Pixels, count: int) -> list[Ids]:
        found: dict[int, Ids] = {}
        images = iter(list(enumerate(pixels)))
        await asyncio.gather(*(client(images, found) for _ in range(count)))
        return [found[place] for place in range(len(pixels))]

    return Side("its scheduler", lambda pixels, count: runner.run(clients(pixels, count)), meter)


def pytorch(folder: Path, bundle: Path, threads: int, device: str = "cpu") -> Captioner:
    """Returns the PyTorch captioner whose export a bundle is, weights and all, for `generate`.

    Args:
        folder: The training run.
        bundle: Says how the run's weights were averaged with those that it started from.
        threads: Of this process; PyTorch has one setting for all that it computes.
        device: Where it computes.

    Raises:
        UsageError: The folder is no training run.
    """
    check_run(folder)
    torch.set_num_threads(threads)
    source = Run(folder)
    # A run that started from no other has the weights of the export already.
    share = Bundle.open(bundle).manifest.provenance["blend"] if source.recipe.start else 1
    captioner = round_weights(blended(source, share)).to(device)
    captioner.encoder.to(memory_format=torch.channels_last)  # convolves in half the time
    return captioner


def generate(captioner: Captioner, generation: Generation, *, half: bool = False) -> Side:
    """Returns `generate` on the same weights; both attentions keep their keys and values.

    Args:
        captioner: On the device that computes.
        generation: The search.
        half: Under autocast, in the type of two bytes that the device is best at.
    """
    text, model = captioner.text, captioner.decoder.model
    device = next(captioner.parameters()).device
    dtype, words = {
        "cpu": (torch.bfloat16, "bfloat16"),
        "cuda": (torch.float16, "float16"),
    }[device.type]

    @torch.inference_mode()
    def caption(pixels: Pixels, batch: int) -> list[Ids]:
        found: list[Ids] = []
        for part in _batches(pixels, batch):
            with torch.autocast(device.type, dtype, enabled=half):
                # The view's layout is channels-last, as that of the weights is.
                memory = captioner.encode(torch.from_numpy(part).to(device).permute(0, 3, 1, 2))
                rows = model.generate(
                    input_ids=torch.full((len(part), 1), text.bos_id, device=device),
                    attention_mask=torch.ones(len(part), 1, dtype=torch.int64, device=device),
                    encoder_hidden_states=memory,  # (B, N, D); repeated for the beams in there
                    num_beams=generation.num_beams,
                    max_new_tokens=generation.max_new_tokens,
                    min_new_tokens=generation.min_new_tokens,
                    length_penalty=generation.length_penalty,
                    no_repeat_ngram_size=generation.no_repeat_ngram_size,
                    early_stopping=False,
                    do_sample=False,
                    use_cache=True,
                    pad_token_id=text.pad_id,
                    bos_token_id=text.bos_id,
                    eos_token_id=text.eos_id,
                )
            found += [_without_padding(row, text.eos_id) for row in rows[:, 1:].tolist()]
        return found

    return Side(f"`generate` in {words}" if half else "`generate`", caption)


@torch.inference_mode()
def score(captioner: Captioner, image: Pixels, ids: Ids, length_penalty: float) -> float:
    """Returns a caption's score by the PyTorch captioner; the image is (H, W, 3)."""
    device = next(captioner.parameters()).device
    tokens = torch.tensor([[captioner.text.bos_id, *ids]], device=device)
    pixels = torch.from_numpy(image[None]).to(device).permute(0, 3, 1, 2)
    logits = captioner(pixels, tokens[:, :-1])
    log_probs = logits.log_softmax(-1).gather(2, tokens[:, 1:, None])
    return float(log_probs.sum() / len(ids) ** length_penalty)


def _batches(pixels: Pixels, size: int) -> Iterator[Pixels]:
    for start in range(0, len(pixels), size):
        yield pixels[start : start + size]


def _best(captions: list[Caption] | CaptionFailed) -> Ids:
    if isinstance(captions, CaptionFailed):
        raise captions
    return captions[0].token_ids


def _without_padding(row: list[int], eos_id: int) -> Ids:
    if eos_id not in row:
        return tuple(row)
    return (*takewhile(lambda token: token != eos_id, row), eos_id)
