"""Captions that are all alike end a run in time, and say whether the image counts."""

import json
from pathlib import Path

import pytest

from trainer.errors import CollapseError
from trainer.stages import finetune
from trainer.stages._collapse import CollapseWatch

ALIKE, DIFFERENT = ["a dog"] * 31 + ["a cat"], [f"a dog and {n} cats" for n in range(32)]


def watched(epochs: int, captions, cost: float = 0.0) -> int:
    """Returns the epoch, counted from 0, in which the run is ended."""
    watch = CollapseWatch(epochs, lambda: cost)
    for epoch in range(epochs):
        try:
            watch.check(epoch, captions(epoch))
        except CollapseError:
            return epoch
    return epochs


def test_three_evaluations_in_the_second_half_end_a_run() -> None:
    assert watched(12, lambda epoch: ALIKE) == 6
    assert watched(12, lambda epoch: DIFFERENT if epoch < 6 else ALIKE) == 8
    assert watched(12, lambda epoch: ALIKE if epoch < 6 else DIFFERENT) == 12
    assert watched(12, lambda epoch: ALIKE if epoch % 3 else DIFFERENT) == 12
    assert watched(3, lambda epoch: ALIKE) == 3  # at the end there is nothing left to save


@pytest.mark.parametrize(
    ("cost", "why"), [(0.001, "the decoder does not look"), (0.5, "says the common thing")]
)
def test_the_message_says_what_to_do(cost: float, why: str) -> None:
    watch = CollapseWatch(6, lambda: cost)
    watch.check(1, ALIKE)
    watch.check(2, ALIKE)
    with pytest.raises(CollapseError, match=rf"31 of 32 images are captioned 'a dog'.*{why}"):
        watch.check(3, ALIKE)


def test_a_run_on_wrong_pairs_is_ended(shapes: Path, tmp_path: Path) -> None:
    """Every image with the same caption: nothing to look at."""
    coco = json.loads((shapes / "captions_train.json").read_text())
    for row in coco["annotations"]:
        row["caption"] = "a red circle left of a blue square"
    (tmp_path / "train.json").write_text(json.dumps(coco))
    keys = {
        "data": {
            "train": tmp_path / "train.json",
            "dev": shapes / "captions_dev.json",
            "images": shapes / "images",
        },
        "image": {"height": 32, "width": 32},
        "encoder": {
            "name": "timm_vit",
            "model": "vit_tiny_patch16_224",
            "embed_dim": 32,
            "depth": 1,
            "num_heads": 2,
        },
        "bridge": {"name": "cross_attention", "layers": 0},
        "decoder": {"name": "gpt2", "width": 32, "layers": 1, "heads": 2, "max_length": 24},
        "objective": {"name": "lm"},
        "optim": {"lr": 1e-2},
        "loop": {"epochs": 10, "batch_size": 16, "workers": 0},
        "generation": {"num_beams": 1, "max_new_tokens": 12},
    }
    config = finetune.Config.model_validate(keys)
    with pytest.raises(CollapseError, match=r"16 of 16 images .* the decoder does not look"):
        finetune.run(config, tmp_path / "run")
    assert (tmp_path / "run/last.safetensors").exists()
