"""A server under load, from outside: its registry, its memory, its swaps, its metrics."""

import asyncio
import http.client
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

from common import UsageError
from PIL import Image

from exports.bundle import Bundle, write_bundle
from exports.images import preprocess
from exports.registry import Registry
from serving.captioner import Captioner
from serving.errors import CaptionFailed
from serving.params import Params
from serving.session import Graphs, OnnxSession

SWAP_S = 120.0
_FEWER_TOKENS = 4
_ANSWERED_S = 10.0


@dataclass(frozen=True, slots=True)
class Served:
    """A server, what it is sent, and what it must answer.

    Attributes:
        port: Where it listens on 127.0.0.1.
        pid: Its first process.
        registry: What it follows.
        requests: Whole requests.
        expected: The caption of each by version.
    """

    port: int
    pid: int
    registry: Registry
    requests: Sequence[bytes]
    expected: Mapping[str, Sequence[str]]

    def memory(self) -> int:
        """Returns the bytes that its first process has in memory."""
        lines = Path(f"/proc/{self.pid}/status").read_text(encoding="utf-8").splitlines()
        return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmRSS"))

    def model(self) -> dict[str, object]:
        """Returns what it says of its model."""
        [model] = json.loads(self._get("/v1/models"))["models"]
        return dict(model)

    def swaps(self) -> int:
        """Returns how many bundles it has put to work."""
        return int(str(self.model()["swaps"]))

    def waiting(self) -> int:
        """Returns the caption requests that it works on, in all of its replicas."""
        lines = self._get("/metrics").decode().splitlines()
        running = [line for line in lines if line.startswith("cutline_requests_running")]
        if not running:
            raise UsageError("/metrics does not say how many requests run")
        return round(sum(float(line.split()[-1]) for line in running)) - 1  # this one is one too

    def _get(self, path: str) -> bytes:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        try:
            connection.request("GET", path)
            return connection.getresponse().read()
        finally:
            connection.close()


def publish_two(
    bundle: Path, other: Path | None, folder: Path, jpegs: Sequence[bytes]
) -> tuple[Registry, dict[str, list[str]]]:
    """Publishes two bundles as versions 1 and 2 of one model.

    Args:
        bundle: Version 1.
        other: Version 2; by default version 1, held to fewer words, so that most captions differ.
        folder: Where to put the registry.
        jpegs: Photographs.

    Returns:
        The registry, and the caption of each photograph by version.

    Raises:
        UsageError: Both give the same captions, so that an answer does not tell who gave it.
    """
    registry = Registry(folder / "registry")
    name = Bundle.open(bundle).manifest.name
    second = other if other is not None else _shorter(bundle, folder / "shorter")
    for version, path in (("1", bundle), ("2", second)):
        registry.publish(path, model=name, version=version)
    registry.promote(name, "1")
    expected = {
        version: _captions(registry.resolve(f"{name}@{version}").path, jpegs) for version in "12"
    }
    if expected["1"] == expected["2"]:
        raise UsageError("both versions give the same captions: name another with --other")
    return registry, expected


async def swap_back_and_forth(served: Served, count: int, every_s: float) -> list[float]:
    """Promotes the other version so often, and returns how long each took to answer.

    Raises:
        UsageError: A version did not answer in time.
    """
    [name] = served.registry.models()
    took = []
    for _ in range(count):
        began = time.monotonic()
        now = served.registry.resolve(name).version
        wanted = "2" if now == "1" else "1"
        await asyncio.to_thread(served.registry.promote, name, wanted)
        while await asyncio.to_thread(_answering, served) != wanted:
            if time.monotonic() - began > SWAP_S:
                raise UsageError(f"version {wanted} does not answer after {SWAP_S:g} s")
            await asyncio.sleep(0.05)
        took.append(time.monotonic() - began)
        await asyncio.sleep(max(0.0, began + every_s - time.monotonic()))
    return took


async def settled(served: Served) -> int:
    """Returns the requests that a server still works on when it has had time to end all."""
    end = time.monotonic() + _ANSWERED_S
    while (waiting := await asyncio.to_thread(served.waiting)) and time.monotonic() < end:
        await asyncio.sleep(0.1)
    return waiting


def _answering(served: Served) -> str:
    active = served.model()["active"]
    assert isinstance(active, dict)  # it was ready
    return str(active["version"])


def _shorter(bundle: Path, target: Path) -> Path:
    """Writes a bundle whose captions are cut short, and proves itself by such ones."""
    opened = Bundle.open(bundle)
    manifest = opened.manifest
    defaults = manifest.defaults.model_copy(
        update={"max_new_tokens": _FEWER_TOKENS, "min_new_tokens": 0}
    )
    session = OnnxSession(Graphs.read(opened), manifest, threads=1)
    captioner = Captioner(manifest, opened.tokenizer(), session)
    golden = []
    for entry in manifest.golden:
        [found] = captioner.caption_batch(
            [_pixels(opened.read(entry.image), captioner)], [Params.of(defaults)]
        )
        if isinstance(found, CaptionFailed):
            raise UsageError(f"{bundle}: {entry.image}: {found.detail}")
        best = found[0]
        update = {
            "token_ids": best.token_ids,
            "text": best.text,
            "score": best.score,
            "match": None,
            "similarity": None,
        }
        golden.append(entry.model_copy(update=update))
    update = {"defaults": defaults, "golden": tuple(golden), "files": {}}
    write_bundle(target, manifest.model_copy(update=update), opened.files())
    return target


def _captions(bundle: Path, jpegs: Sequence[bytes]) -> list[str]:
    captioner = Captioner.load(bundle, threads=1)
    params = Params.of(captioner.manifest.defaults)
    found = captioner.caption_batch(
        [_pixels(jpeg, captioner) for jpeg in jpegs], [params] * len(jpegs)
    )
    return ["" if isinstance(one, CaptionFailed) else one[0].text for one in found]


def _pixels(body: bytes, captioner: Captioner):  # type: ignore[no-untyped-def]
    with Image.open(BytesIO(body)) as image:
        return preprocess(image, captioner.image_spec)
