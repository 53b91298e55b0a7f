"""A scan finds every image that would break an epoch, and keeps every one that would not."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from exports.images import ImageSpec
from trainer.data import Example
from trainer.errors import DataError
from trainer.photos import load_all, load_pixels, load_thumbnail, scan_images, usable_examples

SPEC = ImageSpec(height=24, width=32)


def _photo(seed: int = 0, size: tuple[int, int] = (96, 64)) -> Image.Image:
    blocks = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return Image.fromarray(blocks).resize(size, Image.Resampling.BICUBIC)


@pytest.fixture
def odd_folder(tmp_path: Path) -> Path:
    _photo(1).save(tmp_path / "plain.jpg")
    _photo(2).convert("CMYK").save(tmp_path / "cmyk.jpg")
    deep = np.linspace(0, 65535, 64 * 96).reshape(64, 96).astype(np.uint16)
    Image.fromarray(deep).save(tmp_path / "deep.png")
    _photo(3).save(tmp_path / "moving.gif", save_all=True, append_images=[_photo(4)])
    exif = Image.Exif()
    exif[0x0112] = 6
    _photo(5).save(tmp_path / "sideways.jpg", exif=exif)
    layered = _photo(6).convert("RGBA")
    layered.putalpha(90)
    layered.save(tmp_path / "layered.png")
    body = (tmp_path / "plain.jpg").read_bytes()
    (tmp_path / "cut.jpg").write_bytes(body[: len(body) // 2])
    (tmp_path / "text.jpg").write_text("not an image at all")
    (tmp_path / "empty.png").write_bytes(b"")
    damaged = bytearray((tmp_path / "layered.png").read_bytes())
    damaged[len(damaged) // 2] ^= 0xFF
    (tmp_path / "damaged.png").write_bytes(damaged)
    _photo(7, (9, 200)).save(tmp_path / "tiny.png")
    return tmp_path


def _examples(folder: Path) -> list[Example]:
    return [Example(path, (), None) for path in sorted(folder.iterdir())]


def test_a_scan_sorts_the_good_from_the_bad(odd_folder: Path) -> None:
    examples = [*_examples(odd_folder), Example(odd_folder / "gone.jpg", (), None)]
    report = scan_images(examples, progress=False)
    assert [item.image.name for item in report.ok] == [
        *("cmyk.jpg", "deep.png", "layered.png", "moving.gif", "plain.jpg", "sideways.jpg")
    ]
    reasons = {path.name: reason for path, reason in report.problems}
    assert set(reasons) == {
        *("cut.jpg", "damaged.png", "empty.png", "gone.jpg", "text.jpg", "tiny.png")
    }
    assert reasons["tiny.png"] == "tiny: 9 x 200 pixels"
    assert reasons["gone.jpg"] == "no such file"
    assert reasons["text.jpg"] == "not an image that Pillow can open"
    assert {path.name: note.split(",")[0] for path, note in report.notes} == {
        "cmyk.jpg": "CMYK",
        "deep.png": "more than 8 bits a channel",
        "moving.gif": "several frames",
        "sideways.jpg": "turned upright as its EXIF says",
    }
    assert set(report.fingerprints) == {item.image for item in report.ok}


def test_what_a_scan_passes_loads_and_what_it_drops_does_not(odd_folder: Path) -> None:
    examples = _examples(odd_folder)
    ok = scan_images(examples, progress=False).ok
    for item in examples:
        if item in ok:
            pixels = load_pixels(item.image, SPEC)
            assert (pixels.shape, pixels.dtype) == ((24, 32, 3), np.uint8)
        elif item.image.name != "tiny.png":
            with pytest.raises(DataError, match=item.image.name):
                load_pixels(item.image, SPEC)


def test_loading_all_keeps_the_order(odd_folder: Path) -> None:
    ok = scan_images(_examples(odd_folder), progress=False).ok
    pixels = load_all(ok[::-1], SPEC)
    for item, loaded in zip(ok, pixels[::-1], strict=True):
        assert np.array_equal(loaded, load_pixels(item.image, SPEC))
    with pytest.raises(DataError, match=r"cut\.jpg"):
        load_all(_examples(odd_folder), SPEC)


def test_an_epoch_starts_with_a_printed_list(
    odd_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert len(usable_examples(_examples(odd_folder), progress=False)) == 6
    printed = capsys.readouterr().out
    assert "6 images ready, 5 left out" in printed
    assert f"left out: {odd_folder / 'text.jpg'}: not an image" in printed


def test_no_usable_image_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_text("no")
    with pytest.raises(DataError, match="no image of the data set can be decoded"):
        usable_examples(_examples(tmp_path), progress=False)


def test_a_thumbnail_is_upright_and_keeps_its_proportions(odd_folder: Path) -> None:
    assert load_thumbnail(odd_folder / "plain.jpg", 48).shape == (32, 48, 3)
    assert load_thumbnail(odd_folder / "sideways.jpg", 48).shape == (48, 32, 3)
    assert load_thumbnail(odd_folder / "plain.jpg", 500).shape == (64, 96, 3)
