"""Fine-tuning a CLIP: what is trained, which weights are kept, what it is worth."""

import json
import random
import re
import shutil
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from PIL import Image
from pretraining import CNN, VIT, recipe
from torch import nn

from trainer.__main__ import main
from trainer.checkpoint import below, load_checkpoint
from trainer.config import read_recipe, validate
from trainer.data import Example, read_examples, write_coco
from trainer.errors import CheckpointError, ConfigError, DataError
from trainer.interpolation import interpolated
from trainer.loop import TrainingLoop
from trainer.metrics._scores import mean_scores
from trainer.probes import Probes
from trainer.retrieval import Pairs, mean_recall, retrieval_ranks
from trainer.stages import align, pretrain, shapecaps
from trainer.stages._towers import TowerReader, open_towers

pytestmark = pytest.mark.usefixtures("no_curves")
CLIP = {"name": "clip", "width": 16, "text": {"width": 32, "layers": 2, "heads": 2, "dropout": 0.1}}
Tensors = dict[str, torch.Tensor]


def start_of(shapes: Path, folder: Path, encoder: dict[str, Any] = VIT) -> Path:
    """A run of `pretrain`, of one epoch."""
    made = recipe(shapes, CLIP, loop={"epochs": 1}, optim={"lr": 3e-3})
    pretrain.run(made.model_copy(update={"encoder": encoder}), folder)
    return folder


def config(start: Path, shapes: Path, **changes: Any) -> align.Config:
    """A recipe of 3 folds; the alphas that are not 0 or 1 are the more interesting ones."""
    table: dict[str, Any] = {
        "start": str(start),
        "data": {"train": shapes / "captions_train.json", "dev": shapes / "captions_dev.json"},
        "alphas": [0.4, 0.7],
        "folds": {"count": 3},
        "augment": {"crop": {"area": 0.7}, "flip": {}},
        "optim": {"lr": 3e-3},
        "loop": {"epochs": 2, "batch_size": 16, "workers": 0, "save_every": 1},
        "neighbours": 4,
    }
    for key, value in changes.items():
        table[key] = {**table.get(key, {}), **value} if isinstance(value, dict) else value
    return validate(align.Config, table, "recipe")


@pytest.fixture(scope="module")
def start(shapes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return start_of(shapes, tmp_path_factory.mktemp("start"))


@pytest.fixture(scope="module")
def aligned(start: Path, shapes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("aligned")
    align.run(config(start, shapes), folder)
    return folder


def weights(folder: Path) -> Tensors:
    return below(load_checkpoint(folder / "last.safetensors")[0], "objective.")


def kept_by(folder: Path) -> Tensors:
    """What a run of `pretrain` keeps: its moving average, where there is one."""
    tensors, _ = load_checkpoint(folder / "last.safetensors")
    return below(tensors, "objective.") | below(tensors, "average.")


def report(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "report.json").read_text(encoding="utf-8"))


def test_what_is_kept_lies_between_the_start_and_the_fine_tuned(start: Path, aligned: Path) -> None:
    alpha = report(aligned)["alpha"]
    before, tuned, kept = kept_by(start), weights(aligned / "all"), weights(aligned)
    assert kept.keys() == before.keys()
    moved = [name for name, value in before.items() if not torch.equal(value, tuned[name])]
    assert len(moved) > 10
    for name, value in before.items():
        expected = (1 - alpha) * value.double() + alpha * tuned[name].double()
        torch.testing.assert_close(kept[name].double(), expected, atol=1e-7, rtol=1e-6)
    assert (aligned / "tokenizer.json").read_bytes() == (start / "tokenizer.json").read_bytes()


@pytest.mark.parametrize("alpha", [0.0, 1.0])
def test_the_ends_are_exact(alpha: float) -> None:
    draw = torch.Generator().manual_seed(0)
    first, second = (
        {"w": 1e3 * torch.randn(1000, generator=draw), "steps": torch.tensor(n)} for n in (3, 7)
    )
    found, end = interpolated(first, second, alpha), second if alpha else first
    assert all(torch.equal(found[name], end[name]) for name in end)
    assert interpolated(first, second, 0.25)["steps"] == 3


def test_the_ends_of_the_curve_are_the_original_and_the_fine_tuned(
    start: Path, aligned: Path, shapes: Path
) -> None:
    """What the report says of dev is what these weights find there, read back from their files."""
    towers, reported = open_towers(str(start)), report(aligned)["retrieval"][0]["figures"]
    examples = read_examples(shapes / "captions_dev.json")
    pixels = np.stack([_pixels(example) for example in examples])
    towers.method.to(memory_format=torch.channels_last)
    for name, folder in (("original", start), ("fine-tuned", aligned / "all")):
        towers.method.load_state_dict(kept_by(folder))
        reader = TowerReader(towers.method, towers.tokenizer, towers.text)
        pairs = Pairs(pixels, [example.captions for example in examples])
        value = mean_recall(*retrieval_ranks(reader, pairs)).mean()
        assert reported[name]["mean recall"][0] == pytest.approx(value, abs=1e-9)


def _pixels(example: Example) -> np.ndarray:
    return np.asarray(Image.open(example.image).convert("RGB"))


@pytest.mark.parametrize("encoder", [VIT, CNN], ids=["vit", "cnn"])
def test_norms_and_early_layers_stay(encoder: dict[str, Any], shapes: Path, tmp_path: Path) -> None:
    start = start_of(shapes, tmp_path / "start", encoder)
    made = config(start, shapes, folds={"count": 2}, alphas=[1.0], loop={"epochs": 1})
    align.run(made, tmp_path / "run")
    before, after = kept_by(start), weights(tmp_path / "run/all")
    moved = {name for name, value in before.items() if not torch.equal(value, after[name])}
    assert {"image_projection.weight", "text_projection.weight"} < moved
    norms = (nn.LayerNorm, nn.BatchNorm2d)
    modules = open_towers(str(start)).method.named_modules()
    still = {name for name, module in modules if isinstance(module, norms)}
    assert len(still) > 8
    assert not [name for name in moved if name.rpartition(".")[0] in still]
    last = ("encoder.backbone.blocks.1.", "text_encoder.blocks.layers.1.")
    if encoder is CNN:
        last = ("encoder.backbone.layer4.", *last[1:])
    inside = {name for name in moved if "projection" not in name}
    assert all(name.startswith(last) for name in inside)
    assert all(any(name.startswith(prefix) for name in inside) for prefix in last)


def test_a_start_s_own_frozen_parameters_are_the_plan_s(
    start: Path, shapes: Path, tmp_path
) -> None:
    made = config(start, shapes, trained=["text_encoder.token_embedding"], folds={"count": 2})
    align.run(made, tmp_path)
    before, after = kept_by(start), weights(tmp_path / "all")
    moved = {name for name, value in before.items() if not torch.equal(value, after[name])}
    assert moved == {"text_encoder.token_embedding.weight"}
    assert report(tmp_path)["trained"][0] == before[moved.pop()].numel()


def test_a_killed_alignment_goes_on_with_the_same_weights(
    start: Path, aligned: Path, shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step, taken = TrainingLoop._train_step, []

    def killed(loop: TrainingLoop, batches: Any) -> Any:
        taken.append(1)
        if len(taken) == 7:  # the third of the second fold's four
            raise KeyboardInterrupt
        return step(loop, batches)

    monkeypatch.setattr(TrainingLoop, "_train_step", killed)
    with pytest.raises(KeyboardInterrupt):
        align.run(config(start, shapes), tmp_path)
    assert not (tmp_path / "last.safetensors").exists()
    align.run(config(start, shapes), tmp_path)
    assert len(taken) == 1 + 3 * 4 + 6  # every step once, but for the killed one
    resumed, whole = weights(tmp_path), weights(aligned)
    assert resumed.keys() == whole.keys()
    assert all(torch.equal(resumed[name], whole[name]) for name in whole)
    again, once = report(tmp_path), report(aligned)
    assert again | {"command": ""} == once | {"command": ""}


def test_other_images_in_the_same_file_are_not_gone_on_with(
    start: Path, shapes: Path, tmp_path: Path
) -> None:
    examples, train = read_examples(shapes / "captions_train.json"), tmp_path / "train.json"
    made = config(start, shapes, data={"train": train, "images": shapes / "images"})
    write_coco(examples, train, images=shapes / "images")
    (tmp_path / "run").mkdir()
    align.run(made, tmp_path / "run")
    swapped = [*examples[:-1], Example(examples[-1].image, examples[0].captions, None)]
    write_coco(swapped, train, images=shapes / "images")
    with pytest.raises(CheckpointError, match="another recipe \\(train_sha256"):
        align.run(made, tmp_path / "run")


def test_more_alphas_and_another_dev_need_no_training(
    start: Path, aligned: Path, shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(TrainingLoop, "_train_step", None)  # any step would fail
    made = config(start, shapes, alphas=[0.1, 0.4, 0.7], data={"dev": None})
    shutil.copytree(aligned, tmp_path / "run")
    align.run(made, tmp_path / "run")
    found = report(tmp_path / "run")
    assert [point[0] for point in found["gains"]] == [0, 0.1, 0.4, 0.7, 1]
    table = found["retrieval"][0]
    assert table["images"] == 48 and table["data"].startswith("the folds held out")
    gains = {alpha: gain for alpha, *gain in found["gains"]}
    kept, tuned = (table["differences"][name] for name in ("interpolated", "fine-tuned"))
    assert gains[found["alpha"]] == pytest.approx(kept["mean recall"])
    assert gains[1] == pytest.approx(tuned["mean recall"]) and gains[0] == [0, 0, 0]


def test_the_result_starts_an_encoder_and_another_alignment(
    start: Path, aligned: Path, shapes: Path, tmp_path: Path
) -> None:
    kept = weights(aligned)
    encoder = {**VIT, "weights": str(aligned)}
    simclr = {"name": "simclr", "hidden": 32, "width": 16}
    made = recipe(shapes, simclr, encoder=encoder, optim={"lr": 1e-12}, loop={"epochs": 1})
    pretrain.run(made, tmp_path / "simclr")
    name = "encoder.backbone.blocks.1.attn.qkv.weight"
    torch.testing.assert_close(weights(tmp_path / "simclr")[name], kept[name], atol=1e-6, rtol=0)
    assert not torch.equal(kept[name], kept_by(start)[name])
    again = open_towers(str(aligned)).method.state_dict()
    assert all(torch.equal(again[name], value) for name, value in kept.items())


def test_the_best_alpha_is_that_of_all_images_and_of_equals_the_smallest() -> None:
    values = {0.0: [0.2, 0.4], 0.3: [0.6, 0.1], 0.6: [0.1, 0.6], 1.0: [0.0, 0.6]}
    found = {alpha: mean_scores("mean recall", np.array(own)) for alpha, own in values.items()}
    gains, alpha = align.chosen_alpha(found)
    assert alpha == 0.3
    assert [point for point, _ in gains] == [0.0, 0.3, 0.6, 1.0]
    assert [gain.value for _, gain in gains] == pytest.approx([0, 0.05, 0.05, 0])
    assert gains[1][1].low == pytest.approx(-0.3)  # both draws of the second image


def test_the_page_stands_alone(aligned: Path) -> None:
    text = (aligned / "align.html").read_text(encoding="utf-8")
    page = ElementTree.fromstring(text.removeprefix("<!doctype html>\n"))
    assert not re.search(r"<script|<link|src=|@import|url\(http", text)
    assert "$" not in re.sub(r"<svg.*?</svg>", "", text, flags=re.DOTALL)
    tables = page.findall(".//table")
    assert [len(table.findall("tbody/tr")) for table in tables] == [3, 2]
    found = report(aligned)
    assert page.findtext(".//h1") == found["verdict"]
    first = tables[0].find("tbody/tr/td/b")
    assert first is not None
    shown = found["retrieval"][0]["figures"]["original"]["TR R@1"][0]
    assert first.text == f"{shown:.3f}"


def test_a_general_set_and_unlabelled_images_are_looked_at(
    start: Path, shapes: Path, tmp_path: Path
) -> None:
    general = {"data": shapes / "captions_dev.json"}
    unlabelled = {"data": shapes / "images", "sample": 20}
    changes = {"general": general, "unlabelled": unlabelled, "folds": {"count": 2}, "alphas": [1.0]}
    align.run(config(start, shapes, loop={"epochs": 1}, **changes), tmp_path)
    found = report(tmp_path)
    assert [table["images"] for table in found["retrieval"]] == [16, 16]
    with pytest.raises(DataError, match=r"48 images are in both data\.train and general\.data"):
        align.run(
            config(start, shapes, general={"data": shapes / "captions_train.json"}), tmp_path / "b"
        )
    assert found["forgetting"]["images"] == 20
    kept = found["forgetting"]["figures"]["fine-tuned"]
    assert set(kept) == {"neighbours", "feature neighbours", "cosine", "CKA"}
    assert 0 < kept["neighbours"][0] <= 1 and kept["CKA"][1:] == [None, None]


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"loop": {"batch_size": 40}}, ConfigError, "a fold learns from 32 images; take 2 to 32"),
        ({"loop": {"accumulate": 2}}, ConfigError, "compares the images of a batch"),
        ({"folds": {"count": 48}}, ConfigError, "leaves a fold 1 image"),
        (
            {"folds": {"count": 49}},
            DataError,
            "48 different images .* cannot be parted into 49 folds",
        ),
        ({"trained": ["encoder.head"]}, ConfigError, "'encoder.head' names no parameter"),
        ({"trained": ["text_encoder.norm"]}, ConfigError, "norms never are"),
        ({"neighbours": 16}, ConfigError, "neighbours = 16, but there are 16 images \\(dev\\)"),
    ],
)
def test_what_cannot_be_is_refused(
    changes: dict[str, Any],
    error: type[Exception],
    message: str,
    start: Path,
    shapes: Path,
    tmp_path: Path,
) -> None:
    with pytest.raises(error, match=message):
        align.run(config(start, shapes, **changes), tmp_path)


def test_dev_must_not_have_been_seen(start: Path, shapes: Path, tmp_path: Path) -> None:
    made = config(start, shapes, data={"dev": shapes / "captions_train.json"})
    with pytest.raises(DataError, match=r"48 images are in both data\.train and"):
        align.run(made, tmp_path)


@pytest.mark.parametrize("alpha", [-0.1, 1.5])
def test_alphas_beyond_the_ends_are_refused(alpha: float, start: Path, shapes: Path) -> None:
    with pytest.raises(ConfigError, match="lies between 0, the original, and 1"):
        config(start, shapes, alphas=[alpha])


def test_keys_that_are_left_out_are_an_alignment_s() -> None:
    made = align.Config(start="x", data={"train": "a"}, optim={"warmup": 0.2}, loop={"clip": 2.0})  # type: ignore[arg-type]
    assert made.optim.lr == 5e-6 and made.loop.epochs == 10


def test_the_command_line_says_one_line(tmp_path: Path, capsys) -> None:
    path = tmp_path / "recipe.toml"
    path.write_text('start = "nowhere"\ndata = { train = "few.json" }\n')
    assert main(["align", str(path), "--out", str(tmp_path / "run")]) == 1
    said = capsys.readouterr().err
    assert said.startswith("error: start = 'nowhere': neither a run of") and said.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_the_tiny_recipe_runs(start: Path, shapes: Path, tmp_path: Path) -> None:
    train, dev = shapes / "captions_train.json", shapes / "captions_dev.json"
    paths = [f"start={start}", f"data.train={train}", f"data.dev={dev}", f"general.data={dev}"]
    sizes = ["folds.count=2", "loop.batch_size=16", "loop.epochs=1", "alphas=[1.0]"]
    command = ["align", "trainer/recipes/tiny/align.toml", *paths, *sizes]
    assert main([*command, "--out", str(tmp_path)]) == 0
    assert report(tmp_path)["command"].startswith("python ")


def test_the_recipes_for_photographs_are_understood() -> None:
    for stage, name in ((align, "align"), (pretrain, "clip")):
        path = Path(f"trainer/recipes/flickr8k/{name}.toml")
        assert validate(stage.Config, read_recipe(path), str(path)).seed == 0


class NoProbes(Probes):
    def __init__(self) -> None: ...

    def measure(self, encoder: Any) -> dict[str, float]:
        names = ("rankme", "alignment", "uniformity", "spread")
        return {f"probe/{name}": 1.0 for name in names}


@pytest.fixture(scope="module")
def drawings(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """500 drawings that a CLIP has learnt from (`start`) or not (`blank`), and 200 of dev.

    Of the last 100 of the 500, which it has not seen, `shuffled.json` has other drawings' captions.
    """
    folder = tmp_path_factory.mktemp("drawings")
    shapecaps.run(shapecaps.Config(images=700, dev=200, side=32), folder)
    examples, images = read_examples(folder / "captions_train.json"), folder / "images"
    seen, hundred = examples[:400], examples[400:]
    captions = [example.captions for example in hundred]
    random.Random(0).shuffle(captions)
    mixed = [Example(e.image, own, None) for e, own in zip(hundred, captions, strict=True)]
    for name, rows in (("seen", seen), ("hundred", hundred), ("shuffled", mixed)):
        write_coco(rows, folder / f"{name}.json", images=images)
    method = {"name": "clip", "width": 32, "text": {"width": 32, "layers": 2, "heads": 2}}
    for name, epochs, lr in (("start", 8, 2e-3), ("blank", 1, 1e-12)):
        made = recipe(
            folder,
            method,
            encoder={**VIT, "embed_dim": 64, "num_heads": 4},
            data={"train": folder / "seen.json"},
            tokenizer={"vocab_size": 320},
            optim={"lr": lr},
            loop={"epochs": epochs, "batch_size": 50, "ema": 0.0, "evaluate_every": 99},
        )
        pretrain.run(made, folder / name, probes=NoProbes())
    return folder


def on_a_hundred(drawings: Path, start: str, train: str, out_dir: Path) -> dict[str, Any]:
    made = config(
        drawings / start,
        drawings,
        data={"train": drawings / f"{train}.json"},
        trained_blocks=2,
        alphas=[0.5],
        folds={"count": 2},
        optim={"lr": 2e-3},
        loop={"epochs": 20, "batch_size": 50},
    )
    align.run(made, out_dir)
    return report(out_dir)


@pytest.mark.slow
def test_a_hundred_pairs_teach(drawings: Path, tmp_path: Path) -> None:
    found = on_a_hundred(drawings, "start", "hundred", tmp_path)
    table = found["retrieval"][0]
    assert table["images"] == 200 and found["alpha"] > 0
    before, after = (table["figures"][name] for name in ("original", "interpolated"))
    for rank in ("TR median", "IR median"):
        assert after[rank][0] < before[rank][0]
        assert table["differences"]["interpolated"][rank][2] < 0  # as is all of its interval
    assert table["differences"]["interpolated"]["mean recall"][1] > 0.03


@pytest.mark.slow
def test_shuffled_captions_teach_nothing(drawings: Path, tmp_path: Path) -> None:
    figures = on_a_hundred(drawings, "blank", "shuffled", tmp_path / "a")["retrieval"][0]["figures"]
    chance = np.mean([1 / 200, 5 / 200, 10 / 200])
    for own in figures.values():
        assert own["mean recall"][1] < chance + 0.01
        assert own["mean recall"][0] < 2 * chance
    # The same with true captions does learn.
    true = on_a_hundred(drawings, "blank", "hundred", tmp_path / "b")["retrieval"][0]["figures"]
    assert true["fine-tuned"]["mean recall"][1] > 3 * chance


@pytest.mark.slow
def test_the_folds_refuse_what_would_only_do_harm(drawings: Path, tmp_path: Path) -> None:
    found = on_a_hundred(drawings, "start", "shuffled", tmp_path)
    assert found["alpha"] == 0 and found["verdict"].startswith("Keep the original")
    figures = found["retrieval"][0]["figures"]
    assert figures["interpolated"] == figures["original"]
    assert figures["fine-tuned"]["mean recall"][2] < figures["original"]["mean recall"][1]
    kept = found["forgetting"]["figures"]
    assert kept["fine-tuned"]["neighbours"][0] < 0.9 and kept["interpolated"]["cosine"][0] == 1
