"""The presets for a hundred labels: on drawings, against a copied caption and plain training."""

import json
from pathlib import Path

import pytest

from trainer.__main__ import main
from trainer.config import read_recipe, validate
from trainer.data import read_examples
from trainer.stages import finetune
from trainer.stages.evaluate import differences_of

RECIPES = Path("trainer/recipes")


def stage(name: str, recipe: str, out: Path, **overrides: object) -> None:
    changes = [f"{key.replace('__', '.')}={value}" for key, value in overrides.items()]
    assert main([name, str(RECIPES / "tiny" / recipe), *changes, "--out", str(out)]) == 0


@pytest.mark.slow
def test_the_preset_beats_a_copied_caption_and_as_many_plain_epochs(tmp_path: Path) -> None:
    """Plain training is by the recipe's own batches of 32: 3 steps an epoch.

    In batches of ten, and so in as many steps as the preset's, it does better than the preset
    (CIDEr-D 3.4 of drawings, see the recipe), and no claim is made.
    """
    raw, hundred, ssl = tmp_path / "shapecaps", tmp_path / "hundred", tmp_path / "simclr"
    stage("shapecaps", "shapecaps.toml", raw)
    stage("shapecaps", "shapecaps.toml", hundred, images=200)
    train, dev = hundred / "captions_train.json", hundred / "captions_dev.json"
    everything = raw / "captions_train.json"
    probe = {"probe__captioned": everything, "probe__dev": dev}
    stage("pretrain", "simclr.toml", ssl, data__train=everything, **probe)
    stage("finetune", "few100.toml", tmp_path / "few", data__train=train, encoder__weights=ssl)
    epochs = json.loads((tmp_path / "few/recipe.json").read_text())["loop"]["epochs"]
    plain = {"data__train": train, "data__dev": dev, "loop__evaluate_every": epochs}
    stage("finetune", "gpt2.toml", tmp_path / "plain", **plain, loop__epochs=epochs)

    told = json.loads((tmp_path / "few/folds.json").read_text())
    assert told["images"] == 100 and told["epochs"] <= epochs
    captions = {}
    for name in ("few", "plain"):
        out, model = tmp_path / name / "evaluation", tmp_path / name
        stage("evaluate", "evaluate.toml", out, model=model, data=dev, neighbours=train)
        rows = (out / "captions.jsonl").read_text().splitlines()
        captions[name] = [json.loads(row)["caption"] for row in rows]
    figures = json.loads((tmp_path / "few/evaluation/figures.json").read_text())
    assert figures["gain"]["CIDEr-D"][1] > 0  # over the nearest of the hundred
    references = [example.captions for example in read_examples(dev)]
    difference = differences_of(references, captions["few"], captions["plain"])["CIDEr-D"]
    assert difference.low > 0


@pytest.mark.parametrize("name", ["tiny/few100.toml", "flickr8k/few100.toml"])
def test_a_preset_is_a_recipe_with_folds(name: str) -> None:
    config = validate(finetune.Config, read_recipe(RECIPES / name), name)
    assert config.folds is not None and config.augment.flip is not None
    assert config.augment.flip.swaps == (("left", "right"),)
    # No fold, and not all of them, leaves an image out of an epoch.
    count, batch = config.folds.count, config.loop.batch_size
    if 100 % count == 0:
        assert 100 % batch == (100 - 100 // count) % batch == 0
