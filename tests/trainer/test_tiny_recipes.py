"""The tiny recipes: methods make an encoder worth more than a random one, objectives learn."""

import csv
import json
import random
import re
from pathlib import Path

import pytest
import torch

from trainer import variants
from trainer.__main__ import main
from trainer.data import Example, read_examples, write_coco
from trainer.runlog import read_log
from trainer.stages import bootstrap, evaluate, shapecaps

RECIPES = Path("trainer/recipes/tiny")


@pytest.fixture(scope="module")
def drawings(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("drawings")
    assert main(["shapecaps", str(RECIPES / "shapecaps.toml"), "--out", str(folder)]) == 0
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("name", variants.names("methods"))
def test_a_method_makes_a_random_encoder_worth_more(
    name: str, drawings: Path, tmp_path: Path
) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    train, dev = drawings / "captions_train.json", drawings / "captions_dev.json"
    paths = [f"data.train={train}", f"probe.captioned={train}", f"probe.dev={dev}"]
    recipe = RECIPES / f"{name}.toml"
    if not recipe.exists():  # a method that has none yet
        recipe, paths = RECIPES / "simclr.toml", [*paths, f'method={{ name = "{name}" }}']
    assert main(["pretrain", str(recipe), "--out", str(tmp_path), *paths]) == 0
    torch.set_num_threads(threads)
    worth = [row["probe/caption_cider"] for row in read_log(tmp_path) if "probe/rankme" in row]
    assert worth[-1] > worth[0] + 0.1
    assert (tmp_path / "curves.png").stat().st_size > 10_000


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "figure", "worst"),
    [
        ("mlm", "dev/token_accuracy", 0.75),
        ("itc", "dev/IR R@10", 0.9),
        ("itm", "dev/ITM AUC", 0.9),
        ("blip", "dev/CIDEr-D", 1.8),
    ],
)
def test_an_objective_on_pairs_learns_from_random_weights(
    name: str, figure: str, worst: float, drawings: Path
) -> None:
    assert finetuned(name, drawings)[figure] > worst


@pytest.mark.slow
@pytest.mark.parametrize("name", ["bart", "clipcap", "git", "gpt2", "llama", "t5"])
def test_a_captioner_learns_to_tell_drawings_apart(name: str, drawings: Path) -> None:
    found = finetuned(name, drawings)
    assert found["dev/CIDEr-D"] > 1.5
    assert found["dev/distinct"] > 0.2


@pytest.mark.slow
def test_a_captioner_behind_examples_learns_to_look(drawings: Path) -> None:
    """Flamingo: encoder and language model, learnt before, stay as they are."""
    finetuned("gpt2", drawings)
    encoder, text = f"encoder.weights={run_of('gpt2', drawings)}", run_of("text", drawings)
    captions = f"data.train={drawings}/captions_train.json"
    recipe = str(RECIPES / "flamingo_text.toml")
    assert main(["finetune", recipe, "--out", str(text), captions, encoder]) == 0
    assert finetuned("flamingo", drawings, f"start={text}", encoder)["dev/CIDEr-D"] > 0.7


def run_of(name: str, drawings: Path) -> Path:
    """Returns the folder of a tiny recipe's run; what is done there is not done again."""
    return drawings / "runs" / name


def finetuned(name: str, drawings: Path, *changes: str) -> dict[str, float]:
    """Returns the last figures of a tiny recipe."""
    threads, folder = torch.get_num_threads(), run_of(name, drawings)
    torch.set_num_threads(2)
    train, dev = drawings / "captions_train.json", drawings / "captions_dev.json"
    paths = [f"data.train={train}", f"data.dev={dev}", *changes]
    assert main(["finetune", str(RECIPES / f"{name}.toml"), "--out", str(folder), *paths]) == 0
    torch.set_num_threads(threads)
    rows = [row for row in read_log(folder) if any(name.startswith("dev/") for name in row)]
    return rows[-1]


@pytest.mark.slow
def test_rewards_make_captions_better_and_leave_them_whole(drawings: Path) -> None:
    finetuned("gpt2", drawings)
    finetuned("scst", drawings, f"start={run_of('gpt2', drawings)}", "loop.epochs=4")
    before, _ = greedily(run_of("gpt2", drawings), drawings)
    after, captions = greedily(run_of("scst", drawings), drawings)
    steps = max(row["step"] for row in read_log(run_of("scst", drawings)))
    assert steps <= 300 and after >= 1.05 * before, (steps, before, after)
    valid = [VALID.fullmatch(caption) is not None for caption in captions]
    assert sum(valid) >= 0.95 * len(valid), [text for text in captions if not VALID.fullmatch(text)]


def greedily(run: Path, drawings: Path) -> tuple[float, list[str]]:
    """Returns CIDEr-D on dev of the likeliest words, and the captions."""
    table = {"model": run, "data": drawings / "captions_dev.json", "generation": {"num_beams": 1}}
    evaluate.run(evaluate.Config.model_validate(table), run / "greedy")
    figures = json.loads((run / "greedy/figures.json").read_text())["figures"]
    assert {"repetition", "bad endings", "length"} <= figures.keys()
    rows = (run / "greedy/captions.jsonl").read_text().splitlines()
    return figures["CIDEr-D"][0], [json.loads(row)["caption"] for row in rows]


def _grammar() -> re.Pattern[str]:
    """What a caption of ShapeCaps may say, true or not."""
    colours, shapes = "|".join(shapecaps.COLOURS), "|".join(shapecaps.SHAPES)
    thing = f"(?:{colours}) (?:{shapes})"
    parts = {
        "first": thing,
        "second": thing,
        "relation": "|".join(shapecaps._RELATIONS),
        "opposite": "|".join(shapecaps._RELATIONS.values()),
    }
    words = {name: f"(?:{part})" for name, part in parts.items()}
    return re.compile("|".join(form.format(**words) for form in shapecaps._TEMPLATES))


VALID = _grammar()


@pytest.mark.slow
def test_a_filter_finds_most_of_the_wrong_captions(drawings: Path, tmp_path: Path) -> None:
    finetuned("itm", drawings)
    more = tmp_path / "more"
    shapecaps.run(shapecaps.Config(images=400, dev=1, seed=1), more)
    drawn, draw = read_examples(more / "captions_train.json"), random.Random(0)
    truth, web = {}, []
    for number, example in enumerate(drawn):
        true = number % 5 < 3  # 40 % of the captions are another image's
        while True:
            caption = draw.choice((example if true else draw.choice(drawn)).captions)
            if (caption in example.captions) == true:
                break
        truth[str(example.image.resolve())] = true
        web.append(Example(example.image, (caption,), None))
    write_coco(web, tmp_path / "web.json", images=more / "images")
    table = {
        "captioner": run_of("itm", drawings),
        "labelled": {"data": drawings / "captions_train.json"},
        "held_out": {"data": drawings / "captions_dev.json"},
        "web": {"data": tmp_path / "web.json", "images": more / "images"},
        "wrong": 0.4,
    }
    bootstrap.run(bootstrap.Config.model_validate(table), tmp_path / "out")
    with (tmp_path / "out/captions.csv").open(encoding="utf-8", newline="") as file:
        kept = [row["image"] for row in csv.DictReader(file) if row["source"] == "web"]
    right = sum(truth[image] for image in kept)
    assert right / len(kept) >= 0.9
    assert right / sum(truth.values()) >= 0.8
