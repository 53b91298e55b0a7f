"""`generate` behind LitServe and behind BentoML; started by `service.py` in the peers' environment.

    PEER_RUN=... python peer_servers.py PORT                        LitServe
    PEER_RUN=... python -m bentoml serve peer_servers:Bento         BentoML

Both read the photograph of a form, batch by their own means, and answer JSON. Whatever costs time
and can be left out is left out: access logs, traces, copies through files.
"""

import os
import sys
from pathlib import Path
from typing import Any

import bentoml
import litserve
import numpy as np
from contenders import Pixels, generate, pytorch
from PIL import Image
from starlette.requests import Request

from exports.bundle import Bundle
from exports.images import preprocess

BATCH = int(os.environ["PEER_BATCH"])
PATIENCE_S = 120


class Model:
    """Photographs in, captions out."""

    def __init__(self) -> None:
        run, bundle = Path(os.environ["PEER_RUN"]), Path(os.environ["PEER_BUNDLE"])
        manifest = Bundle.open(bundle).manifest
        self._spec, self._tokenizer = manifest.image, Bundle.open(bundle).tokenizer()
        captioner = pytorch(run, bundle, int(os.environ["PEER_THREADS"]))
        self._side = generate(captioner, manifest.defaults)

    def pixels(self, image: Image.Image) -> Pixels:
        """Returns what the captioner takes of an image that is opened but not decoded."""
        return preprocess(image, self._spec)

    def captions(self, pixels: Pixels) -> list[str]:
        """Returns the captions of pixels (B, H, W, 3), computed as one batch."""
        found = self._side.caption(pixels, len(pixels))
        return [self._tokenizer.decode(ids) for ids in found]


class Lit(litserve.LitAPI):  # type: ignore[misc]
    """LitServe's four verbs; they run in a worker process beside the one that speaks HTTP."""

    def setup(self, device: str) -> None:
        """Loads the model."""
        self.model = Model()

    def decode_request(self, request: Request) -> Pixels:
        """Returns the pixels of the form's file."""
        return self.model.pixels(Image.open(request["image"].file))

    def batch(self, inputs: list[Pixels]) -> Pixels:
        """Returns one array of many."""
        return np.stack(inputs)

    def predict(self, x: Pixels) -> list[str]:
        """Returns the captions of a batch."""
        return self.model.captions(x)

    def unbatch(self, output: list[str]) -> list[str]:
        """Returns one caption a request."""
        return output

    def encode_response(self, output: str) -> dict[str, str]:
        """Returns the answer."""
        return {"text": output}


@bentoml.service(
    workers=1,
    traffic={"timeout": PATIENCE_S},
    logging={"access": {"enabled": False}},
)
class Bento:
    """BentoML's service: HTTP, batching and the model share one process."""

    def __init__(self) -> None:
        self.model = Model()

    # The latency is where BentoML begins to refuse requests; it is no time to wait.
    @bentoml.api(  # type: ignore[misc]
        route="/predict", batchable=True, max_batch_size=BATCH, max_latency_ms=1000 * PATIENCE_S
    )
    def predict(self, image: list[Image.Image]) -> list[str]:
        """Returns a caption an image; BentoML opens them, and leaves decoding to this thread."""
        return self.model.captions(np.stack([self.model.pixels(opened) for opened in image]))


def main() -> None:
    """Runs LitServe until it is interrupted."""
    api = Lit(max_batch_size=BATCH, batch_timeout=float(os.environ["PEER_WINDOW_S"]))
    server: Any = litserve.LitServer(
        api, accelerator="cpu", workers_per_device=1, timeout=PATIENCE_S, fast_queue=True
    )
    server.run(
        host="127.0.0.1", port=int(sys.argv[1]), log_level="error", generate_client_file=False
    )


if __name__ == "__main__":
    main()
