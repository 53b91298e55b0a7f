"""Examples in a style that was never trained teach it, without training."""

import itertools
from pathlib import Path

import pytest

from trainer.data import Example, read_examples, write_coco
from trainer.decoding import TorchSteps, best_hypotheses
from trainer.intervals import paired_difference
from trainer.metrics import cider
from trainer.photos import load_all
from trainer.run import Recipe, Run
from trainer.stages import finetune, shapecaps
from trainer.stages._few_shot import FewShot, show_examples

STYLES = list(
    itertools.product(
        ("", "there is ", "this shows ", "look at "),
        ("a", "the", "one", "some"),
        ("", " here", " today"),
    )
)
HELD_OUT = (17, 40)  # "there is the ... today", "look at the ... here"


def in_style(caption: str, style: int) -> str:
    """Returns "a red circle above a blue square" in another style."""
    opening, article, ending = STYLES[style]
    words = [article if word == "a" else word for word in caption.split()]
    return f"{opening}{' '.join(words)}{ending}"


def write(folder: Path, split: str, name: str, styles: list[int]) -> Path:
    """Writes a split's drawings with a caption in each of the styles."""
    examples = [
        Example(e.image, tuple(in_style(e.captions[0], style) for style in styles), None)
        for e in read_examples(folder / f"captions_{split}.json")
    ]
    write_coco(examples, folder / name, images=folder / "images")
    return folder / name


@pytest.mark.slow
def test_four_examples_are_worth_more_than_none_in_styles_that_were_held_out(
    tmp_path: Path,
) -> None:
    shapecaps.run(shapecaps.Config(images=500, side=32, dev=100), tmp_path)
    seen = [style for style in range(len(STYLES)) if style not in HELD_OUT]
    vit = {"model": "vit_tiny_patch16_224", "patch_size": 8, "embed_dim": 64, "depth": 2}
    bridge = {"name": "perceiver", "latents": 16, "layers": 1, "heads": 4}
    decoder = {"name": "llama", "width": 64, "layers": 2, "heads": 4, "dropout": 0.0}
    table = {
        "data": {
            "train": write(tmp_path, "train", "train.json", seen),
            "captions_per_image": 3,
        },
        "image": {"height": 32, "width": 32},
        "tokenizer": {"vocab_size": 400},
        "encoder": {"name": "timm_vit", **vit, "num_heads": 4},
        "bridge": {**bridge, "shots": 4, "shot_tokens": 20},
        "decoder": {**decoder, "max_length": 24},
        "objective": {"name": "flamingo", "label_smoothing": 0.0},
        "optim": {"lr": 4e-3, "weight_decay": 0.01},
        "loop": {"epochs": 10, "batch_size": 16, "workers": 0, "ema": 0.95},
        "generation": {"num_beams": 2, "max_new_tokens": 20},
    }
    finetune.run(Recipe.model_validate(table), tmp_path / "run")
    run = Run(tmp_path / "run")
    for style in HELD_OUT:
        labelled = write(tmp_path, "train", f"labelled{style}.json", [style])
        examples = read_examples(write(tmp_path, "dev", f"dev{style}.json", [style]))
        pixels = load_all(examples, run.recipe.image)
        scores = []
        for shots in (0, 4):
            captioner = run.captioner()
            if shots:
                show_examples(FewShot(shots=shots, data=labelled), captioner, run, examples)
            best = best_hypotheses(
                TorchSteps(captioner), pixels, run.recipe.generation, progress=False
            )
            captions = [run.tokenizer.decode(one.token_ids) for one in best]
            scores.append(cider.score([e.captions for e in examples], captions))
        gain = paired_difference(scores[1], scores[0])["CIDEr-D"]
        print(STYLES[style], gain)
        assert gain.low > 0.5
