"""The fast filters give what torchvision's give, and what the textbook says."""

import colorsys
import math

import pytest
import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as F

from trainer.filters import gaussian_blur, shift_hue


def colours() -> Tensor:
    """Random colours, and those where two channels or all are equal: (3, 40, 40), from 0 to 1."""
    image = torch.randint(0, 256, (3, 40, 40), generator=torch.Generator().manual_seed(0)) / 255
    for first, second in ((0, 1), (0, 2), (1, 2)):
        image[first, 4 * first + 2 * second] = image[second, 4 * first + 2 * second]
    image[:, 20] = image[0, 20]
    image[:, 30, :20], image[:, 30, 20:] = 0, 1
    return image


@pytest.mark.parametrize("turn", [-0.5, -0.31, -0.1, 0.0, 0.04, 0.25, 0.5])
def test_hues_are_shifted_as_by_the_textbook_and_by_torchvision(turn: float) -> None:
    image = colours()
    shifted = shift_hue(image, turn)
    torch.testing.assert_close(shifted, F.adjust_hue(image, turn), atol=1e-5, rtol=0)
    for pixel, found in zip(image.flatten(1).T[::7], shifted.flatten(1).T[::7], strict=True):
        hue, saturation, value = colorsys.rgb_to_hsv(*pixel.tolist())
        expected = colorsys.hsv_to_rgb((hue + turn) % 1, saturation, value)
        assert found.tolist() == pytest.approx(expected, abs=1e-5)


def test_a_third_of_a_turn_makes_red_green_and_three_of_them_nothing() -> None:
    red = torch.tensor([1.0, 0.0, 0.0]).view(3, 1, 1).expand(3, 2, 2)
    torch.testing.assert_close(shift_hue(red, 1 / 3)[:, 0, 0], torch.tensor([0.0, 1.0, 0.0]))
    image = colours()
    turned = shift_hue(shift_hue(shift_hue(image, 1 / 3), 1 / 3), 1 / 3)
    torch.testing.assert_close(turned, image, atol=1e-5, rtol=0)


@pytest.mark.parametrize("turn", [0.07, -0.2, 0.5])
def test_a_hue_goes_and_comes_back_within_the_rounding_to_bytes(turn: float) -> None:
    for pixel in [(214, 40, 40), (40, 80, 210), (200, 190, 180), (7, 7, 7), (255, 0, 128)]:
        solid = torch.tensor(pixel, dtype=torch.uint8).view(3, 1, 1).expand(3, 5, 5)
        there = shift_hue(solid / 255, turn).mul(255).round().to(torch.uint8)
        back = shift_hue(there / 255, -turn).mul(255).round()
        assert len(back.flatten(1).unique(dim=1).T) == 1
        assert (back - solid).abs().max() <= 2, (pixel, back[:, 0, 0])


@pytest.mark.parametrize("sigma", [0.1, 0.6, 1.0, 1.7, 3.0])
@pytest.mark.parametrize("shape", [(3, 24, 24), (3, 20, 31)])
def test_the_blur_is_torchvision_s_within_rounding(sigma: float, shape: tuple[int, ...]) -> None:
    image = torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(0)).byte()
    kernel = 2 * math.ceil(3 * sigma) + 1
    expected = F.gaussian_blur(image, [kernel, kernel], [sigma, sigma])
    difference = gaussian_blur(image, sigma).int() - expected.int()
    assert difference.abs().max() <= 1
    assert difference.ne(0).float().mean() < 1e-3


def test_a_blurred_point_has_the_asked_width_and_a_plain_image_stays() -> None:
    point = torch.zeros(3, 41, 41, dtype=torch.uint8)
    point[:, 20, 20] = 255
    across = gaussian_blur(point, 1.5)[0].sum(0)
    places = torch.arange(41) - 20.0
    assert (across * places).sum() == 0
    assert ((across * places**2).sum() / across.sum()) == pytest.approx(1.5**2, rel=0.1)
    plain = torch.full((3, 8, 8), 77, dtype=torch.uint8)
    assert gaussian_blur(plain, 50.0).equal(plain)  # wider than the image
