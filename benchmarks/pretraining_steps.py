"""A pretraining step against lightly's, the masked encoder against the whole, and the views' share.

Both sides train the very same kind of vision transformer on the same views, with AdamW, in one
process, by turns. lightly is installed in an environment of its own. (Not called `ssl`: a script's
folder comes first on Python's path, and the standard library has that name.)
"""

import argparse
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import environments
import numpy as np
from common import ROOT, UsageError, machine, main, photographs, table
from PIL import Image

REQUIREMENT = "lightly==1.6.0"
_INSIDE = "CUTLINE_BENCHMARK_INSIDE"
_SIDE, _PATCH, _WIDTH, _DEPTH, _HEADS = 96, 12, 192, 6, 3
_DECODER = {"width": 128, "layers": 2, "heads": 4}
_MASKED = 0.75
_JITTER = {"brightness": 0.4, "contrast": 0.4, "saturation": 0.4, "hue": 0.1, "probability": 0.8}
# MAE's authors change no colours.
_AUGMENT: dict[str, dict[str, Any]] = {
    "simclr": {"crop": {"area": 0.2}, "flip": {}, "jitter": _JITTER, "grey": {"probability": 0.2}},
    "mae": {"crop": {"area": 0.2}, "flip": {}},
}

Step = Callable[[], None]


def benchmark(arguments: argparse.Namespace, stack: ExitStack) -> None:
    """Prints the tables, from within the peer's environment."""
    del stack
    if _INSIDE not in os.environ:
        python = environments.python_with(
            [REQUIREMENT], environments.PEERS / "lightly", sees_project=True
        )
        inside = {**os.environ, _INSIDE: "1", "PYTHONPATH": str(ROOT)}
        done = subprocess.run([python, *sys.argv], env=inside)
        if done.returncode:
            raise UsageError("the benchmark did not come to its end; see above")
        return
    import torch

    torch.set_num_threads(arguments.threads)
    images = pixels(arguments.images, arguments.batch)
    rounds = f"batches of {arguments.batch}, median of {arguments.rounds} rounds"
    print(machine(arguments.threads, rounds, ["torch", "timm", "lightly"]), "\n")
    sides = {
        "SimCLR": (ours("simclr", images), their_simclr(images)),
        "MAE": (ours("mae", images), their_mae(images)),
    }
    rows = []
    for name, (mine, theirs) in sides.items():
        a, b = by_turns([mine, theirs], arguments.rounds)
        rows.append([name, f"{a * 1e3:.0f}", f"{b * 1e3:.0f}", f"{b / a:.2f}x"])
    print(table(["step", "ours, ms", "lightly, ms", "lightly / ours"], rows), "\n")
    whole, masked = by_turns(encoders(images), arguments.rounds)
    rows = [["all patches", f"{whole * 1e3:.0f}", "1"]]
    rows += [["a quarter of them", f"{masked * 1e3:.0f}", f"{masked / whole:.2f}"]]
    print(table(["MAE's encoder, forward", "ms", "time"], rows), "\n")
    rows = [
        [name, f"{views * 1e3:.1f}", f"{step * 1e3:.0f}", f"{100 * views / (views + step):.0f} %"]
        for name, views, step in loading(images, arguments.rounds)
    ]
    print(table(["views of a batch, no worker", "views, ms", "step, ms", "share"], rows))


def pixels(folder: Path | None, count: int) -> "np.ndarray[Any, np.dtype[np.uint8]]":
    """Returns photographs, a quarter larger than a view, uint8 (n, H, W, 3)."""
    side = round(1.25 * _SIDE)
    found = []
    for path in photographs(folder, count):
        with Image.open(path) as image:
            found.append(np.asarray(image.convert("RGB").resize((side, side))))
    while len(found) < count:  # fewer photographs than a batch: some come again
        found.extend(found[: count - len(found)])
    return np.stack(found)


def method(name: str, batch: int) -> Any:
    """Returns our method on a vision transformer with random weights."""
    import torch

    from trainer import variants
    from trainer.methods._method import Setting

    table = {
        "simclr": {"name": "simclr"},
        "mae": {"name": "mae", **{f"decoder_{key}": value for key, value in _DECODER.items()}},
    }[name]
    sizes = {"patch_size": _PATCH, "embed_dim": _WIDTH, "depth": _DEPTH, "num_heads": _HEADS}
    module, config = variants.parse("encoders", {"name": "timm_vit", **sizes})
    torch.manual_seed(0)
    encoder = module.Encoder(config, (_SIDE, _SIDE))
    methods, config = variants.parse("methods", table)
    return methods.Method(config, encoder, Setting(batch, batch, 1000)).train()


def views_of(name: str, images: "np.ndarray[Any, np.dtype[np.uint8]]", views: int) -> Any:
    """Returns a method's batches as the loop gets them: `uint8 (V * B, 3, H, W)`."""
    from trainer.dataset import ViewDataset
    from trainer.transforms import Augment, Transform

    transform = Transform(Augment.model_validate(_AUGMENT[name]), (_SIDE, _SIDE))
    dataset = ViewDataset(images, [transform] * views, seed=0)
    return dataset.collate([dataset[0, index] for index in range(len(images))])


def training(module: Any, loss: Callable[[], Any]) -> Step:
    """Returns a step of AdamW on the loss."""
    import torch

    optimizer = torch.optim.AdamW([p for p in module.parameters() if p.requires_grad], lr=1e-4)

    def step() -> None:
        loss().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def ours(name: str, images: "np.ndarray[Any, np.dtype[np.uint8]]") -> Step:
    """Returns a training step of our method."""
    made = method(name, len(images))
    batch = views_of(name, images, made.views)
    return training(made, lambda: made(batch)["loss"])


def their_simclr(images: "np.ndarray[Any, np.dtype[np.uint8]]") -> Step:
    """Returns lightly's: its head and loss, put together as in its own example."""
    from lightly.loss import NTXentLoss
    from lightly.models.modules import SimCLRProjectionHead
    from torch import nn

    encoder = method("simclr", len(images)).encoder
    head, criterion = SimCLRProjectionHead(_WIDTH, 2048, 128), NTXentLoss(temperature=0.2)
    first, second = views_of("simclr", images, 2)["images"].chunk(2)

    def loss() -> Any:
        return criterion(*(head(encoder(view)[1]) for view in (first, second)))

    return training(nn.ModuleList([encoder, head]), loss)


def their_mae(images: "np.ndarray[Any, np.dtype[np.uint8]]") -> Step:
    """Returns lightly's: its masked encoder and decoder, put together as in its own example."""
    from lightly.models import utils
    from lightly.models.modules import MaskedVisionTransformerTIMM
    from lightly.models.modules.masked_vision_transformer_decoder_timm import (
        MaskedVisionTransformerDecoderTIMM,
    )
    from torch import nn

    made = method("mae", len(images)).encoder
    encoder = MaskedVisionTransformerTIMM(vit=made.backbone)
    decoder = MaskedVisionTransformerDecoderTIMM(
        num_patches=(_SIDE // _PATCH) ** 2,
        embed_dim=_DECODER["width"],
        depth=_DECODER["layers"],
        num_heads=_DECODER["heads"],
    )
    enter, leave = nn.Linear(_WIDTH, _DECODER["width"]), nn.Linear(_DECODER["width"], _PATCH**2 * 3)
    batch = views_of("mae", images, 1)["images"]
    tokens = encoder.sequence_length

    def loss() -> Any:
        normalised = made.normalise(batch)
        keep, mask = utils.random_token_mask((len(batch), tokens), mask_ratio=_MASKED)
        visible = enter(encoder.encode(images=normalised, idx_keep=keep))
        masked = decoder.mask_token.expand(len(batch), tokens, -1)
        decoded = decoder(utils.set_at_index(masked, keep, visible))
        predicted = leave(utils.get_at_index(decoded, mask))
        patches = utils.patchify(normalised, _PATCH)
        target = utils.normalize_mean_var(utils.get_at_index(patches, mask - 1))
        return nn.functional.mse_loss(predicted, target)

    return training(nn.ModuleList([encoder, decoder, enter, leave]), loss)


def encoders(images: "np.ndarray[Any, np.dtype[np.uint8]]") -> list[Step]:
    """Returns the encoder's forward pass over all patches, and over a quarter of them."""
    import torch

    encoder = method("mae", len(images)).encoder.eval()
    batch = views_of("mae", images, 1)["images"]
    patches = (_SIDE // _PATCH) ** 2
    keep = torch.rand(len(batch), patches).argsort(1)[:, : round(patches * (1 - _MASKED))]

    @torch.no_grad()
    def whole() -> None:
        encoder(batch)

    @torch.no_grad()
    def masked() -> None:
        encoder.visible_tokens(batch, keep)

    return [whole, masked]


def loading(
    images: "np.ndarray[Any, np.dtype[np.uint8]]", rounds: int
) -> list[tuple[str, float, float]]:
    """Returns per method the seconds that the views of a batch take, and those of its step."""
    found = []
    for title, views in (("SimCLR", 2), ("MAE", 1)):
        name = title.lower()
        step = ours(name, images)
        sides = [lambda name=name, views=views: views_of(name, images, views), step]
        found.append((title, *by_turns(sides, rounds)))
    return found


def by_turns(sides: list[Step], rounds: int) -> list[float]:
    """Returns the median seconds of each side, which take turns."""
    for side in sides:
        side()
    seconds: list[list[float]] = [[] for _ in sides]
    for _ in range(rounds):
        for side, taken in zip(sides, seconds, strict=True):
            started = time.perf_counter()
            side()
            taken.append(time.perf_counter() - started)
    return [statistics.median(taken) for taken in seconds]


def command_line() -> argparse.ArgumentParser:
    """Returns the parser."""
    made = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    made.add_argument("--images", type=Path, help="a folder of photographs")
    made.add_argument("--batch", type=int, default=64)
    made.add_argument("--rounds", type=int, default=9)
    made.add_argument("--threads", type=int, default=2, help="of each side")
    made.set_defaults(tiny=False)
    return made


if __name__ == "__main__":
    sys.exit(main(benchmark, command_line().parse_args()))
