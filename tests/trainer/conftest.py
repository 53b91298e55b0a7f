"""A tiny captioner and a tiny captioned data set, made once a session."""

from pathlib import Path

import pytest
import torch

from exports.images import ImageSpec
from exports.text import TextSpec
from trainer.captioner import Captioner
from trainer.stages import shapecaps

TEXT = TextSpec(vocab_size=40, pad_id=0, bos_id=1, eos_id=2, max_length=12)
CNN = {"name": "timm_cnn", "model": "tf_efficientnet_lite0"}
VIT = {
    "name": "timm_vit",
    "model": "vit_tiny_patch16_224",
    "patch_size": 16,
    "embed_dim": 32,
    "depth": 2,
    "num_heads": 2,
}
GPT2 = {"name": "gpt2", "width": 32, "layers": 2, "heads": 2, "dropout": 0.0, "max_length": 12}


@pytest.fixture(scope="session", autouse=True)
def _one_thread():
    torch.set_num_threads(1)


@pytest.fixture
def make_captioner():
    """Returns a builder of random captioners; the seed decides the weights."""

    def make(*, encoder=None, bridge_layers=1, seed=0):
        torch.manual_seed(seed)
        captioner = Captioner(
            encoder=encoder or VIT,
            bridge={"name": "cross_attention", "layers": bridge_layers, "heads": 2, "dropout": 0.0},
            decoder=GPT2,
            image=ImageSpec(height=32, width=48),
            text=TEXT,
        )
        with torch.no_grad():  # random weights say nearly the same to everything; sharpen them
            for parameter in captioner.decoder.parameters():
                if parameter.ndim > 1:
                    parameter.mul_(6)
        return captioner.eval()

    return make


@pytest.fixture(scope="session")
def shapes(tmp_path_factory) -> Path:
    """A folder of 64 ShapeCaps drawings, 16 of them in dev."""
    folder = tmp_path_factory.mktemp("shapecaps")
    shapecaps.run(shapecaps.Config(images=64, side=32, dev=16), folder)
    return folder
