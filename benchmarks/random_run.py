"""A run that nobody trained: a captioner of the base recipe's kind, but small, for `--tiny`."""

from pathlib import Path

import torch

from trainer.checkpoint import save_checkpoint
from trainer.config import read_recipe, validate, write_resolved
from trainer.run import Recipe, build_captioner
from trainer.stages import export, shapecaps
from trainer.tokenizer import train_tokenizer

RECIPE = Path(__file__).parents[1] / "trainer" / "recipes" / "flickr8k" / "base.toml"
SMALL = (
    *("image.height=64", "image.width=64", "tokenizer.vocab_size=300"),
    *("decoder.width=64", "decoder.layers=2", "decoder.heads=4", "bridge.heads=4"),
    'encoder={name="timm_vit",model="vit_tiny_patch16_224",embed_dim=64,depth=2,num_heads=4}',
)


def random_run(folder: Path) -> tuple[Path, Path, Path]:
    """Returns the folders of a run, of its bundle and of pictures, all made inside `folder`."""
    run = folder / "run"
    shapecaps.run(shapecaps.Config(images=64, dev=8, side=96), folder)
    recipe = validate(Recipe, read_recipe(RECIPE, SMALL), str(RECIPE))
    tokenizer, text = train_tokenizer(
        ["any words will do", "any words at all"],
        vocab_size=recipe.tokenizer.vocab_size,
        max_length=recipe.decoder["max_length"],
    )
    # So few words fill a part of the vocabulary; the graphs have the size of the whole.
    text = text.model_copy(update={"vocab_size": recipe.tokenizer.vocab_size})
    torch.manual_seed(0)
    captioner = build_captioner(recipe, text, pretrained=False)
    with torch.no_grad():  # at random all tokens are nearly alike; sharper ones tell beams apart
        for parameter in captioner.decoder.parameters():
            if parameter.ndim > 1:
                parameter.mul_(4)

    run.mkdir()
    write_resolved(recipe, run / "recipe.json")
    (run / "tokenizer.json").write_bytes(tokenizer)
    (run / "text.json").write_text(text.model_dump_json(), encoding="utf-8")
    # Cloned: tied weights are one storage, which safetensors refuses.
    state = {f"objective.captioner.{k}": v.clone() for k, v in captioner.state_dict().items()}
    save_checkpoint(run / "last.safetensors", state, {"step": 0})
    config = {
        "run": run,
        "name": "random",
        "data": folder / "captions_dev.json",
        "parity_images": 4,
        "card": dict.fromkeys(export.Card.model_fields, "Random weights."),
    }
    export.run(export.Config.model_validate(config), run)
    return run, run / "bundle", folder / "images"
