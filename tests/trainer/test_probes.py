"""Probes: they find what is known of an encoder, disturb nothing, and notice a collapse."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_captioner import VIT
from torch import nn

from exports.images import ImageSpec
from trainer import variants
from trainer.data import Example, read_examples, write_coco
from trainer.errors import ConfigError, DataError
from trainer.intervals import paired_difference
from trainer.probes import ProbeConfig, Probes, collapse_alarm

SIZE = ImageSpec(height=16, width=16)
COLOURS = {"red": (250, 0, 0), "green": (0, 250, 0), "blue": (0, 0, 250), "white": (250, 250, 250)}
LABEL_FREE = {"probe/rankme", "probe/alignment", "probe/uniformity", "probe/spread"}


class Colours(nn.Module):
    """Pools an image to its mean colour, times a factor."""

    def __init__(self, factor: float = 1.0, offset: float = -60.0) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(factor))
        self.offset = offset

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        tokens = (images.float() * self.factor + self.offset).flatten(2).transpose(1, 2)
        return tokens, tokens.mean(1)


class Noisy(Colours):
    """Draws random numbers while it encodes."""

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        tokens, pooled = super().forward(images)
        return tokens, pooled + torch.rand_like(pooled)


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    """A folder of 48 captioned pictures of one colour each, 16 of them in dev, and labels."""
    folder = tmp_path_factory.mktemp("photos")
    draw = np.random.default_rng(0)
    examples, labels = [], ["image,label"]
    for number in range(48):
        name, colour = list(COLOURS.items())[number % 4]
        shade = np.clip(np.array(colour) + draw.integers(-40, 41, 3), 0, 255)
        path = folder / f"{number:02d}.png"
        Image.fromarray(np.full((20, 20, 3), shade, np.uint8)).save(path)
        captions = (f"a {name} wall", f"one {name} wall in the sun", "nobody can say what this is")
        examples.append(Example(path, captions, None))
        labels.append(f"{path.name},{name}")
    write_coco(examples[:32], folder / "captioned.json")
    write_coco(examples[32:], folder / "dev.json")
    (folder / "labels.csv").write_text("\n".join(labels))
    return folder


def probes(photos: Path, **keys) -> Probes:
    table = {"captioned": photos / "captioned.json", "dev": photos / "dev.json", **keys}
    config = ProbeConfig.model_validate(table)
    return Probes(config, SIZE, read_examples(photos / "captioned.json"), seed=0)


def test_an_encoder_that_sees_colours_finds_their_captions_and_labels(photos: Path) -> None:
    figures = probes(photos, labels=photos / "labels.csv").measure(Colours())
    assert figures["probe/knn"] == figures["probe/linear"] == 1.0
    # Every copied caption is one of the picture's own references.
    assert figures["probe/caption_cider"] > 3.0
    assert figures["probe/caption_low"] <= figures["probe/caption_cider"]
    assert figures["probe/caption_cider"] <= figures["probe/caption_high"]
    assert 1.5 < figures["probe/rankme"] <= 3.01  # three colours
    assert figures["probe/spread"] > 0.5
    assert collapse_alarm(figures, figures) is None


def test_a_constant_encoder_knows_nothing_and_trips_the_alarm(photos: Path) -> None:
    measured = probes(photos, labels=photos / "labels.csv")
    start, figures = measured.measure(Colours()), measured.measure(Colours(factor=0.0))
    assert figures["probe/spread"] == pytest.approx(0.0, abs=1e-6)
    assert figures["probe/rankme"] == pytest.approx(1.0, abs=1e-3)
    assert figures["probe/alignment"] == pytest.approx(0.0, abs=1e-6)
    assert figures["probe/uniformity"] == pytest.approx(0.0, abs=1e-6)
    assert figures["probe/caption_cider"] < start["probe/caption_cider"] / 2
    assert figures["probe/knn"] < 0.5 and figures["probe/linear"] < 0.5
    for first in (start, {}):
        assert "nearly the same features" in (collapse_alarm(figures, first) or "")


def test_a_random_encoder_trips_no_alarm(shapes: Path) -> None:
    examples = read_examples(shapes / "captions_train.json", images=shapes / "images")
    image = ImageSpec(height=32, width=32)
    torch.manual_seed(0)
    module, config = variants.parse("encoders", VIT)
    encoder = module.Encoder(config, (32, 32)).eval()
    figures = Probes(ProbeConfig(), image, examples, seed=0).measure(encoder)
    assert set(figures) == LABEL_FREE
    assert collapse_alarm(figures, figures) is None


def test_features_that_are_no_numbers_trip_the_alarm(photos: Path) -> None:
    figures = probes(photos).measure(Colours(factor=math.inf))
    assert set(figures) == LABEL_FREE and all(math.isnan(value) for value in figures.values())
    assert "not finite" in (collapse_alarm(figures, {}) or "")


@pytest.mark.parametrize(
    ("figures", "first", "alarm"),
    [
        ({"probe/rankme": 1.9}, {"probe/rankme": 1.9}, "one direction only (RankMe 1.90)"),
        ({"probe/rankme": 9.0}, {"probe/rankme": 30.0}, "(RankMe 9.0, at the start 30.0)"),
        ({"probe/rankme": 11.0}, {"probe/rankme": 30.0}, None),
        ({"probe/rankme": 9.0}, {}, None),
        (
            {"probe/rankme": 9.0, "probe/caption_cider": 0.5},
            {"probe/rankme": 30.0, "probe/caption_cider": 0.4},
            None,
        ),
        (
            {"probe/rankme": 9.0, "probe/caption_cider": 0.4},
            {"probe/rankme": 30.0, "probe/caption_cider": 0.5},
            "no probe with labels got better",
        ),
        ({"probe/spread": 0.02}, {}, "spread 0.0200"),
        ({"probe/spread": math.nan}, {}, "not finite"),
    ],
)
def test_the_alarm_has_its_reasons(figures, first, alarm) -> None:
    healthy = {"probe/rankme": 40, "probe/alignment": 0.1, "probe/uniformity": -2.0}
    reason = collapse_alarm({**healthy, "probe/spread": 0.8, **figures}, first)
    assert reason is None if alarm is None else alarm in (reason or "")


def test_measuring_leaves_the_random_state_and_repeats_itself(photos: Path) -> None:
    torch.manual_seed(5)
    state = torch.get_rng_state()
    measured = probes(photos, labels=photos / "labels.csv")
    first = measured.measure(Noisy())
    assert torch.equal(torch.get_rng_state(), state)
    assert measured.measure(Noisy()) == first
    measured.caption_scores(Noisy())
    assert torch.equal(torch.get_rng_state(), state)
    assert probes(photos, labels=photos / "labels.csv").measure(Noisy()) == first


def test_measuring_leaves_no_gradients(photos: Path) -> None:
    encoder = Colours()
    probes(photos, labels=photos / "labels.csv").measure(encoder)
    assert encoder.factor.grad is None and torch.is_grad_enabled()


def test_a_sample_of_the_raw_images_is_looked_at(photos: Path) -> None:
    seen = []

    class Counting(Colours):
        def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            seen.append(len(images))
            return super().forward(images)

    config = ProbeConfig(sample=10)
    Probes(config, SIZE, read_examples(photos / "captioned.json"), seed=0).measure(Counting())
    assert seen == [10, 10, 10]  # the images and two views of them


def test_two_encoders_are_compared_image_by_image(photos: Path) -> None:
    measured = probes(photos)
    good, bad = measured.caption_scores(Colours()), measured.caption_scores(Colours(factor=0.0))
    assert len(good.per_image) == 16
    assert paired_difference(good, bad)["CIDEr-D"].low > 0
    assert paired_difference(good, good)["CIDEr-D"].value == 0.0


def test_a_draw_reveals_one_caption_of_so_many_images(photos: Path) -> None:
    def worth(**keys: int) -> float:
        config = ProbeConfig(captioned=photos / "captioned.json", dev=photos / "dev.json", **keys)
        probes = Probes(config, SIZE, read_examples(photos), seed=0)
        return probes.measure(Colours())["probe/caption_cider"]

    assert worth(reveal=1) < worth(reveal=24) < worth()  # colours come in; typical ones beat drawn
    few = [worth(reveal=4, draws=draws) for draws in (1, 40, 80)]
    assert abs(few[2] - few[1]) < 0.5 * abs(few[2] - few[0])  # draws even out
    with pytest.raises(ConfigError, match=r"probe.reveal = 99, but .* has 32 images"):
        worth(reveal=99)


def test_what_is_measured_must_not_be_copied_from(photos: Path) -> None:
    with pytest.raises(DataError, match=r"32 images are in both probe\.captioned and probe\.dev"):
        probes(photos, dev=photos / "captioned.json")


@pytest.mark.parametrize("missing", ["captioned", "dev"])
def test_captioned_and_dev_go_together(photos: Path, missing: str) -> None:
    with pytest.raises(ConfigError, match=r"probe\.captioned and probe\.dev go together"):
        probes(photos, **{missing: None})


def test_without_captions_there_are_no_scores(photos: Path) -> None:
    with pytest.raises(ConfigError, match=r"needs probe\.captioned and probe\.dev"):
        probes(photos, captioned=None, dev=None).caption_scores(Colours())


@pytest.mark.parametrize(
    ("rows", "found"),
    [
        (["00.png,red,train", "01.png,red,test"], "1 images of 1 labels to learn from, 1 to"),
        (["00.png,red,train", "01.png,green,train"], "2 images of 2 labels to learn from, 0 to"),
    ],
)
def test_labels_must_leave_something_to_do(photos: Path, tmp_path: Path, rows, found) -> None:
    path = tmp_path / "labels.csv"
    path.write_text("\n".join(["image,label,split", *rows]))
    with pytest.raises(DataError, match=found):
        probes(photos, labels=path, captioned=None, dev=None, images=photos)


def test_a_labelled_image_that_cannot_be_read_is_left_out(photos: Path, tmp_path: Path) -> None:
    path = tmp_path / "labels.csv"
    rows = [
        f"{n:02d}.png,{list(COLOURS)[n % 4]},{'test' if n > 20 else 'train'}" for n in range(30)
    ]
    path.write_text("\n".join(["image,label,split", "no.png,red,test", *rows]))
    figures = probes(photos, labels=path, captioned=None, dev=None, images=photos)
    assert figures.measure(Colours())["probe/knn"] == 1.0
