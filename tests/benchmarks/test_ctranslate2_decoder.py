"""CTranslate2's decoder is the captioner's: the same log-probabilities, the same captions."""

import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from exports.images import ImageSpec
from exports.text import TextSpec
from trainer.captioner import Captioner

SIZES = {"embed_dim": 32, "depth": 1, "num_heads": 2, "patch_size": 16}


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    import ctranslate2_decoder

    return ctranslate2_decoder


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


@pytest.fixture
def captioner() -> Captioner:
    torch.manual_seed(0)
    captioner = Captioner(
        encoder={"name": "timm_vit", "model": "vit_tiny_patch16_224", "weights": "", **SIZES},
        bridge={"name": "cross_attention", "layers": 1, "heads": 2},
        decoder={"name": "gpt2", "width": 32, "layers": 2, "heads": 2, "max_length": 32},
        image=ImageSpec(height=32, width=48),
        text=TextSpec(vocab_size=90, pad_id=0, bos_id=1, eos_id=2, max_length=32),
    ).eval()
    with torch.no_grad():  # at random all tokens are nearly alike, and norms and biases do nothing
        for parameter in captioner.decoder.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return captioner


@pytest.mark.slow
def test_it_says_what_the_captioner_says(
    benchmark: Any, captioner: Captioner, stack: ExitStack, tmp_path: Path
) -> None:
    import environments
    from ctranslate2_side import REQUIREMENT, CTranslate2

    python = environments.python_with([REQUIREMENT], tmp_path)
    pixels = np.random.default_rng(0).integers(0, 256, (9, 32, 48, 3), dtype=np.uint8)
    memory = benchmark.encode(captioner, pixels)
    kinds = {
        kind: CTranslate2(
            captioner, memory, compute_type=kind, threads=2, stack=stack, python=python
        )
        for kind in ("float32", "int8")
    }
    peer = kinds["float32"]
    for setting in (benchmark.FIXED, benchmark.GREEDY):
        expected = benchmark.reference(captioner, memory, setting.generation)
        assert len(set(expected)) > 1  # it looks at the images
        for batch in (1, 4, 9):
            decoded = peer.decode(range(9), batch, setting)
            assert decoded.ids == expected
            assert decoded.seconds > 0
        assert peer.decode([5, 2], 2, setting).ids == [expected[5], expected[2]]
        assert benchmark.worst_error(captioner, memory, peer, expected) < 2e-5
        assert 1e-4 < benchmark.worst_error(captioner, memory, kinds["int8"], expected) < 1
    lengths = {len(ids) for ids in kinds["int8"].decode(range(9), 9, benchmark.FIXED).ids}
    assert lengths == {24}
    assert environments.python_with([REQUIREMENT], tmp_path) == python  # and installs nothing again


def test_a_process_that_gives_up_says_why(captioner: Captioner, stack: ExitStack) -> None:
    from common import UsageError
    from ctranslate2_side import CTranslate2

    memory = np.zeros((1, 6, 32), np.float32)
    with pytest.raises(UsageError, match=r"gave up: ModuleNotFoundError: .*ctranslate2"):
        CTranslate2(
            captioner,
            memory,
            compute_type="int8",
            threads=1,
            stack=stack,
            python=Path(sys.executable),
        )
