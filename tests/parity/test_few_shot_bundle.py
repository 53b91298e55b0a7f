"""A captioner of prompts as a bundle: the encoder graph looks examples up, nothing else knows."""

from pathlib import Path

import pytest
import torch

from exports.bundle import Bundle
from exports.manifest import Generation
from serving.captioner import Captioner as Served
from serving.params import Params
from trainer.compression import round_weights
from trainer.data import read_examples
from trainer.decoding import TorchSteps, beam_search
from trainer.errors import DataError
from trainer.photos import load_all
from trainer.run import Recipe, Run
from trainer.stages import export, finetune, shapecaps
from trainer.stages._few_shot import FewShot, show_examples

SHOTS, SHOT_TOKENS = 2, 12
CARD = {"description": "d", "data": "d", "licence": "l", "failures": "f"}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of a few steps behind examples, beside the drawings that it learnt from."""
    root = tmp_path_factory.mktemp("few_shot")
    shapecaps.run(shapecaps.Config(images=40, side=32, dev=12), root)
    vit = {"model": "vit_tiny_patch16_224", "embed_dim": 32, "depth": 1, "num_heads": 2}
    bridge = {"name": "perceiver", "latents": 3, "layers": 1, "heads": 2}
    table = {
        "data": {"train": root / "captions_train.json", "captions_per_image": 2},
        "image": {"height": 32, "width": 32},
        "tokenizer": {"vocab_size": 300},
        "encoder": {"name": "timm_vit", **vit},
        "bridge": {**bridge, "shots": SHOTS, "shot_tokens": SHOT_TOKENS},
        "decoder": {"name": "llama", "width": 32, "layers": 1, "heads": 4, "max_length": 16},
        "objective": {"name": "flamingo", "label_smoothing": 0.0},
        "optim": {"lr": 1e-2},
        "loop": {"epochs": 20, "batch_size": 14, "workers": 0, "evaluate_every": 20},
        "generation": {"num_beams": 2, "max_new_tokens": 14},
    }
    finetune.run(Recipe.model_validate(table), root / "run")
    return root


def test_the_server_s_captions_are_the_trainer_s(trained: Path) -> None:
    few_shot = FewShot(shots=SHOTS, data=trained / "captions_train.json", limit=20)
    dev = trained / "captions_dev.json"
    table = {"run": trained / "run", "name": "few", "data": dev, "few_shot": few_shot, "card": CARD}
    table["golden"] = sorted((trained / "images").glob("*.png"))[:8]
    export.run(export.Config.model_validate(table), trained / "exported")  # parity is checked there
    bundle = Bundle.open(trained / "exported" / "bundle")
    assert "prefix_visible" in bundle.manifest.encoder.outputs
    few = {"shots": SHOTS, "data": "captions_train.json", "images": 20}
    assert bundle.manifest.provenance["few_shot"] == few

    run = Run(trained / "run")
    examples = read_examples(dev)
    pixels = load_all(examples, run.recipe.image)
    captioner = run.captioner()
    show_examples(few_shot, captioner, run, examples)
    captioner = round_weights(captioner)
    assert captioner.examples is not None and captioner.examples.token_ids.shape[0] == 20
    served = Served.load(trained / "exported" / "bundle", threads=1)
    for beams in (1, 3):
        generation = Generation(num_beams=beams, num_captions=beams, max_new_tokens=12)
        ours = beam_search(TorchSteps(captioner), pixels, generation)
        theirs = served.caption_batch(pixels, [Params.of(generation)] * len(pixels))
        for first, second in zip(ours, theirs, strict=True):
            assert [h.token_ids for h in first] == [c.token_ids for c in second]
            assert [h.score for h in first] == pytest.approx([c.score for c in second], abs=1e-4)


def test_the_examples_count(trained: Path) -> None:
    run = Run(trained / "run")
    examples = read_examples(trained / "captions_dev.json")
    images = torch.from_numpy(load_all(examples, run.recipe.image)).permute(0, 3, 1, 2)
    begun = torch.full((len(images), 1), run.text.bos_id)
    few_shot = FewShot(shots=1, data=trained / "captions_train.json")
    captioner = run.captioner()
    with torch.no_grad():
        without = captioner(images, begun)
        show_examples(few_shot, captioner, run, examples)
        assert (captioner(images, begun) - without).abs().max() > 1e-2


def test_what_is_captioned_must_not_be_an_example(trained: Path) -> None:
    run = Run(trained / "run")
    dev = trained / "captions_dev.json"
    with pytest.raises(DataError, match=r"12 images are in both few_shot\.data and data"):
        show_examples(FewShot(shots=1, data=dev), run.captioner(), run, read_examples(dev))
