"""Augmentations: what each row does, how often and how strongly, and that a seed decides it all."""

import hashlib
import math
import random
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import interpolate

from trainer.config import Config, read_recipe, validate
from trainer.dataset import CaptionIds, ViewDataset
from trainer.errors import ConfigError
from trainer.stages import pretrain
from trainer.transforms import Augment, Jitter, Transform

SIMCLR: dict[str, Any] = {
    "crop": {"area": 0.2},
    "flip": {},
    "jitter": {"brightness": 0.4, "contrast": 0.4, "saturation": 0.4, "hue": 0.1},
    "grey": {},
    "blur": {},
    "solarise": {},
}
EVERYTHING = {**SIMCLR, "rotation": {"degrees": 15}, "quarters": {}, "erase": {}}


def noise(height: int = 40, width: int = 40) -> Tensor:
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)
    return torch.from_numpy(pixels).permute(2, 0, 1)


def solid(*pixel: int, side: int = 8) -> Tensor:
    return torch.tensor(pixel, dtype=torch.uint8).view(3, 1, 1).expand(3, side, side)


def ramps(side: int = 120) -> Tensor:
    """A picture that tells where it was: red grows to the right, green downwards, to 2 * side."""
    along = torch.arange(side, dtype=torch.uint8) * 2
    across, down = along.expand(side, side), along[:, None].expand(side, side)
    return torch.stack([across, down, torch.full((side, side), 255, dtype=torch.uint8)])


def views(image: Tensor, count: int, size: int | None = None, **rows: Any) -> list[Tensor]:
    side = size or image.shape[1]
    transform = Transform(Augment.model_validate(rows), (side, side))
    return [transform(image, seed, flip="free") for seed in range(count)]


def test_nothing_asked_changes_nothing() -> None:
    image = noise()
    for rows in ({}, {name: {**row, "probability": 0} for name, row in EVERYTHING.items()}):
        (view,) = views(image, 1, **rows)
        assert view.equal(image)
        (smaller,) = views(image, 1, 32, **rows)
        assert smaller.equal(interpolate(image[None], (32, 32), mode="bilinear", antialias=True)[0])


@pytest.mark.parametrize("shape", [(40, 40), (50, 50), (64, 48), (17, 90)])
def test_views_have_the_asked_size_and_leave_the_image_alone(shape: tuple[int, int]) -> None:
    image = noise(*shape)
    before = image.clone()
    for name, row in [*EVERYTHING.items(), ("everything", None)]:
        rows = {name: {**row, "probability": 1}} if row is not None else EVERYTHING
        for view in views(image, 10, 40, **rows):
            assert view.shape == (3, 40, 40) and view.dtype == torch.uint8
    upright = {name: row for name, row in EVERYTHING.items() if name != "quarters"}
    transform = Transform(Augment.model_validate(upright), (24, 56))
    assert all(transform(image, seed, flip="free").shape == (3, 24, 56) for seed in range(10))
    assert image.equal(before)


def digest(seed: int) -> str:
    transform = Transform(Augment.model_validate(EVERYTHING), (32, 32))
    body = b"".join(
        transform(noise(), 100 * seed + n, flip="free").numpy().tobytes() for n in range(20)
    )
    return hashlib.sha256(body).hexdigest()


def test_a_seed_gives_the_same_bytes_in_every_process() -> None:
    here = [digest(seed) for seed in range(4)]
    torch.manual_seed(9)  # not what is drawn from
    assert len(set(here)) == 4
    with ProcessPoolExecutor(2, get_context("spawn")) as pool:
        assert list(pool.map(digest, range(4))) == here


def test_a_thousand_pairs_of_views_are_pairs_of_different_views() -> None:
    transform = Transform(Augment.model_validate(SIMCLR), (24, 24))
    dataset = ViewDataset(noise().permute(1, 2, 0)[None].numpy(), [transform] * 2, seed=0)
    pairs = [dataset[epoch, 0]["views"] for epoch in range(1000)]
    assert not any(first.equal(second) for first, second in pairs)
    bodies = {view.numpy().tobytes() for pair in pairs for view in pair}
    assert len(bodies) == 2000


def test_one_view_s_draws_say_nothing_of_the_other_s() -> None:
    transform = Transform(Augment.model_validate({"flip": {}}), (4, 4))
    image = ramps(4)
    dataset = ViewDataset(image.permute(1, 2, 0)[None].numpy(), [transform] * 2, seed=0)
    pairs = [dataset[epoch, 0]["views"] for epoch in range(1000)]
    counts = Counter((a.equal(image), b.equal(image)) for a, b in pairs)
    chi_square = sum((counts[a, b] - 250) ** 2 / 250 for a in (True, False) for b in (True, False))
    assert chi_square < 16.3  # 3 degrees of freedom, p = 0.001


@pytest.mark.parametrize("name", EVERYTHING)
@pytest.mark.parametrize("probability", [0.0, 0.3, 1.0])
def test_rows_act_as_often_as_they_are_asked_to(name: str, probability: float) -> None:
    image, count = noise(100, 100) if name == "crop" else noise(24, 24), 1000
    strong = {**EVERYTHING[name], "probability": probability}
    if name == "blur":
        strong["sigma"] = [1, 2]  # much less leaves every byte as it was
    changed = sum(not view.equal(image) for view in views(image, count, **{name: strong}))
    spread = math.sqrt(count * probability * (1 - probability))
    whole = 0.01 * count * probability if name == "crop" else 0  # crops that kept everything
    assert -4 * spread - whole <= changed - count * probability <= 4 * spread


def test_crops_keep_the_asked_share_in_the_asked_shapes() -> None:
    shares, stretches, centres = [], [], []
    for view in views(ramps(), 600, 96, crop={"area": 0.3, "ratio": 0.8}):
        # The distance of the first pixel's centre from the last's is 95/96 of the part's side.
        width, height = ((view[n].max() - view[n].min()) / 2 * 96 / 95 / 120 for n in (0, 1))
        shares.append(float(width * height))
        stretches.append(float(width / height))
        centres.append(float(view[0].float().mean()) / 240)
    assert 0.28 < min(shares) < 0.33 and 0.97 < max(shares) < 1.03
    assert np.mean(shares) == pytest.approx(0.65, abs=0.03)  # uniform
    assert 0.78 < min(stretches) < 0.85 and 1.18 < max(stretches) < 1.29
    assert (
        min(centres) < 0.35
        and max(centres) > 0.65
        and np.mean(centres) == pytest.approx(0.5, abs=0.02)
    )


def test_rotations_turn_by_at_most_the_asked_angle_to_either_side() -> None:
    angles = []
    for view in views(ramps(), 300, rotation={"degrees": 20}):
        inner = view[:2, 40:80, 40:80].float()
        right, down = inner[0].diff(dim=1).mean(), inner[0].diff(dim=0).mean()
        angles.append(math.degrees(math.atan2(down, right)))
    assert -20.5 < min(angles) < -18 and 18 < max(angles) < 20.5
    assert np.mean(angles) == pytest.approx(0, abs=2.5)


def test_four_times_the_same_quarter_turn_is_none() -> None:
    image = noise()
    transform = Transform(Augment.model_validate({"quarters": {"probability": 1}}), (40, 40))
    turns = Counter()
    for seed in range(300):
        once = transform(image, seed, flip="free")
        (turn,) = [n for n in range(4) if once.equal(image.rot90(n, (1, 2)))]
        turns[turn] += 1
        view = once
        for _ in range(3):
            view = transform(view, seed, flip="free")
        assert view.equal(image)
    assert set(turns) == {1, 2, 3} and min(turns.values()) > 70
    with pytest.raises(ConfigError, match=r"augment\.quarters: .* 40 x 48 .* only squares"):
        Transform(Augment.model_validate({"quarters": {}}), (40, 48))


def test_a_flip_is_the_mirror_image_and_twice_nothing() -> None:
    image = noise()
    (mirrored,) = views(image, 1, flip={"probability": 1})
    assert mirrored.equal(image.flip(2))
    (twice,) = views(mirrored, 1, flip={"probability": 1})
    assert twice.equal(image)


def test_what_may_not_be_flipped_is_not() -> None:
    image = noise()
    rows = {name: {**EVERYTHING[name], "probability": 1} for name in ("flip", "quarters", "grey")}
    transform = Transform(Augment.model_validate(rows), (40, 40))
    (grey,) = views(image, 1, grey={"probability": 1})
    for seed in range(20):
        assert transform(image, seed, flip="never").equal(grey)
        assert not transform(image, seed, flip="free").equal(grey)


def factors(image: Tensor, measure: Any, **strengths: float) -> list[float]:
    """Returns by how much `measure` changes in each of 400 views."""
    before = measure(image.double())
    found = views(image, 400, jitter=strengths)
    return [float(measure(view.double()) / before) for view in found]


@pytest.mark.parametrize(
    ("name", "image", "measure"),
    [
        ("brightness", solid(100, 60, 140), lambda view: view.mean()),
        (
            "contrast",
            torch.cat([solid(90, 90, 90), solid(150, 150, 150)], 2)[:, :, 4:12],
            lambda view: view.max() - view.min(),
        ),
        ("saturation", solid(150, 100, 100), lambda view: view.amax() - view.amin()),
    ],
)
def test_jitter_stays_within_the_asked_strength(name: str, image: Tensor, measure: Any) -> None:
    found = factors(image, measure, **{name: 0.3})
    assert 0.68 < min(found) < 0.73 and 1.27 < max(found) < 1.32
    assert np.mean(found) == pytest.approx(1, abs=0.03)


def test_hues_stay_within_the_asked_share_of_the_circle() -> None:
    turns = []
    for view in views(solid(200, 40, 40), 400, jitter={"hue": 0.1}):
        red, green, blue = (view[:, 0, 0].double() - 40).tolist()
        assert red == 160 and min(green, blue) == 0  # value and saturation stay
        turns.append((green - blue) / 160 / 6)
    assert -0.101 < min(turns) < -0.09 and 0.09 < max(turns) < 0.101
    assert np.mean(turns) == pytest.approx(0, abs=0.01)


def test_jitter_is_torchvision_s_changes_in_an_order_that_is_drawn() -> None:
    from torchvision.transforms.v2 import functional as F  # after trainer, in new processes too

    image = noise()
    for seed in range(20):
        draw = random.Random(seed)
        strengths = (0.2, 0.3, 0.4)
        factors = [draw.uniform(1 - strength, 1 + strength) for strength in strengths]
        steps = list(
            zip(
                (F.adjust_brightness, F.adjust_contrast, F.adjust_saturation, F.adjust_hue),
                (*factors, draw.uniform(-0.1, 0.1)),
                strict=True,
            )
        )
        draw.shuffle(steps)
        expected = image / 255
        for adjust, amount in steps:
            expected = adjust(expected, amount)
        row = Jitter(brightness=0.2, contrast=0.3, saturation=0.4, hue=0.1)
        found = row.apply(image, random.Random(seed))
        assert (found - 255 * expected).abs().max() < 0.51


def test_grey_is_the_luma_in_all_three_channels() -> None:
    (view,) = views(solid(200, 40, 90), 1, grey={"probability": 1})
    assert view.unique().tolist() == [int(0.2989 * 200 + 0.587 * 40 + 0.114 * 90)]


def test_blurs_stay_within_the_asked_width() -> None:
    point = torch.zeros(3, 41, 41, dtype=torch.uint8)
    point[:, 20, 20] = 255
    places = torch.arange(41) - 20.0
    widths = []
    for view in views(point, 300, blur={"sigma": [0.6, 1.8], "probability": 1}):
        across = view[0].sum(0)
        widths.append(math.sqrt((across * places**2).sum() / across.sum()))
    assert 0.5 < min(widths) < 0.7 and 1.6 < max(widths) < 1.9


def test_solarising_inverts_from_the_threshold_on() -> None:
    ramp = torch.arange(256, dtype=torch.uint8).view(1, 16, 16).expand(3, 16, 16)
    (view,) = views(ramp, 1, solarise={"threshold": 100, "probability": 1})
    expected = [value if value < 100 else 255 - value for value in range(256)]
    assert view[0].flatten().tolist() == expected


def test_holes_have_the_asked_area_and_lie_anywhere() -> None:
    shares, centres = [], []
    row = {"area": [0.1, 0.3], "ratio": 0.5, "probability": 1}
    for view in views(solid(9, 9, 9, side=60), 400, erase=row):
        hole = (view == 0).all(0)
        assert (view[:, ~hole] == 9).all()
        rows, columns = hole.any(1).sum(), hole.any(0).sum()
        assert rows * columns == hole.sum()  # a rectangle
        assert 0.45 < rows / columns < 2.2
        shares.append(float(hole.float().mean()))
        centres.append(float(hole.nonzero()[:, 1].float().mean()) / 60)
    assert 0.09 < min(shares) < 0.12 and 0.28 < max(shares) < 0.31
    assert min(centres) < 0.35 and max(centres) > 0.65


class Recipe(Config):
    augment: Augment = Augment()
    second_view: Augment | None = None


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"flip": {"probability": 2}}, r"flip\.probability: .*less than or equal to 1 \(found 2\)"),
        ({"grey": {"probability": -0.1}}, r"grey\.probability: .*\(found -0\.1\)"),
        ({"crop": {"area": 0}}, r"crop\.area: .*greater than 0 \(found 0\)"),
        ({"crop": {"ratio": 1.3}}, r"crop\.ratio: .*\(found 1\.3\)"),
        ({"rotation": {"degrees": 270}}, r"rotation\.degrees: .*\(found 270\)"),
        ({"rotation": {}}, r"rotation\.degrees: field required"),
        ({"jitter": {"hue": 0.7}}, r"jitter\.hue: .*\(found 0\.7\)"),
        ({"blur": {"sigma": [2, 1]}}, r"blur\.sigma: the smaller number comes first \(found"),
        ({"blur": {"sigma": [0, 1]}}, r"blur\.sigma\.0: .*greater than 0 \(found 0\)"),
        ({"solarise": {"threshold": 256}}, r"solarise\.threshold: .*\(found 256\)"),
        ({"erase": {"area": [0.1, 1.5]}}, r"erase\.area\.1: .*\(found 1\.5\)"),
        ({"crop": 0.4}, r"crop: .*valid dictionary.*\(found 0\.4\)"),
        ({"crop": {"aera": 0.4}}, r"'\w+\.crop\.aera'; the keys are area, probability, ratio"),
        ({"blurr": {}}, r"'\w+\.blurr'; the keys are blur, crop,"),
    ],
)
def test_values_without_sense_are_refused_by_name(row: dict[str, Any], message: str) -> None:
    for table in ("augment", "second_view"):
        with pytest.raises(ConfigError, match=message) as caught:
            validate(Recipe, {table: row}, "here")
        assert table in str(caught.value)


@pytest.mark.parametrize("row", [{"quarters": {}}, {"rotation": {"degrees": 90}}])
def test_captions_refuse_what_turns_up_elsewhere(row: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="captions say what is above what"):
        Augment.model_validate(row).check_upright()
    upright = {**SIMCLR, "rotation": {"degrees": 15}, "erase": {}}
    Augment.model_validate(upright).check_upright()


def test_a_method_that_reads_captions_keeps_them_true(shapes: Path, tmp_path: Path) -> None:
    changes = [
        f"data.train={shapes / 'captions_train.json'}",
        "method={name='clip'}",
        "second_view={quarters={}}",
    ]
    recipe = read_recipe(Path("trainer/recipes/tiny/simclr.toml"), changes)
    with pytest.raises(ConfigError, match="captions say what is above what"):
        pretrain.run(validate(pretrain.Config, recipe, "here"), tmp_path)
    image = ramps(4)
    pixels = image.permute(1, 2, 0)[None].repeat(2, 1, 1, 1).numpy()
    transform = Transform(Augment.model_validate({"flip": {"probability": 1}}), (4, 4))
    captions = CaptionIds(written=[[[3]], [[4]]], mirrored=[[[3]], None])
    dataset = ViewDataset(pixels, [transform], seed=0, token_ids=captions)
    assert dataset[0, 0]["views"][0].equal(image.flip(2))
    assert dataset[0, 1]["views"][0].equal(image)
