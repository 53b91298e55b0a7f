"""A tiny captioner and a tiny captioned data set, made once a session."""

from pathlib import Path

import pytest
import torch
from tiny_captioner import GPT2, TEXT, VIT

from exports.images import ImageSpec
from trainer.captioner import Captioner
from trainer.stages import pretrain, shapecaps


@pytest.fixture(scope="session", autouse=True)
def _one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def no_curves():
    """Drawing takes longer than a tiny run; test_plots.py and test_pretrain.py see to it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pretrain, "plot_log", lambda folder: None)
        yield


@pytest.fixture(scope="session")
def make_captioner():
    """Returns a builder of random captioners; the seed decides the weights."""

    def make(*, encoder=None, bridge_layers=1, seed=0, bridge=None, decoder=None, sharpen=6):
        torch.manual_seed(seed)
        cross = {"name": "cross_attention", "layers": bridge_layers, "heads": 2, "dropout": 0.0}
        captioner = Captioner(
            encoder=encoder or VIT,
            bridge=bridge or cross,
            decoder=decoder or GPT2,
            image=ImageSpec(height=32, width=48),
            text=TEXT,
        )
        with torch.no_grad():  # random weights say nearly the same to everything; sharpen them
            for parameter in captioner.decoder.parameters():
                if parameter.ndim > 1:
                    parameter.mul_(sharpen)
            for block in captioner.decoder.gated:
                block.attention_gate.fill_(1)
                block.mlp_gate.fill_(0.5)
        return captioner.eval()

    return make


@pytest.fixture(scope="session")
def shapes(tmp_path_factory) -> Path:
    """A folder of 64 ShapeCaps drawings, 16 of them in dev."""
    folder = tmp_path_factory.mktemp("shapecaps")
    shapecaps.run(shapecaps.Config(images=64, side=32, dev=16), folder)
    return folder
