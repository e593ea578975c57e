"""Probes against closed forms and against scipy, the standard library and PIL."""

import colorsys
import math

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import ndimage

from diffreward.rewards import evaluate, make_reward, probes
from diffreward.rewards.testing import check_reward
from diffreward.samples import Samples

PROBES = ["sharpness", "contrast", "saturation", "entropy"]
RGB = np.array([0.299, 0.587, 0.114])


def noise(b: int, h: int, w: int) -> np.ndarray:
    """(b, h, w, 3) uint8: random colours, the later images with fewer and darker ones."""
    rng = np.random.default_rng(0)
    top = np.linspace(255, 40, b)[:, None, None, None]
    return (rng.integers(0, 9, (b, h, w, 3)) / 8 * top).round().astype(np.uint8)


def value(name: str, images) -> torch.Tensor:
    if isinstance(images, np.ndarray):
        images = torch.from_numpy(images).permute(0, 3, 1, 2) / 255
    return evaluate(make_reward(name), Samples(images, "image")).value


def flat(*rgb: float, size: int = 8) -> torch.Tensor:
    return torch.tensor([float(c) for c in rgb]).view(1, 3, 1, 1).expand(1, 3, size, size)


def checkerboard(low: float = 0.0, high: float = 1.0, size: int = 8) -> torch.Tensor:
    odd = torch.arange(size)[:, None] + torch.arange(size) & 1
    return torch.where(odd.bool(), high, low).expand(1, 3, size, size).clone()


# --------------------------------------------------------------------------------------------
# Closed forms
# --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PROBES)
def test_a_flat_grey_image_scores_zero(name):
    torch.testing.assert_close(
        value(name, torch.cat([flat(0.3, 0.3, 0.3), flat(0, 0, 0), flat(1, 1, 1)])),
        torch.zeros(3),
        atol=1e-6,
        rtol=0,
    )


def test_a_checkerboard_is_the_top_of_the_ranges():
    """Every pixel differs from its four neighbours by d: Laplacian +-4d, standard deviation d/2."""
    for low, high in ((0.0, 1.0), (0.25, 0.75)):
        d, board = high - low, checkerboard(low, high)
        assert value("sharpness", board).item() == pytest.approx((4 * 255 * d) ** 2, rel=1e-5)
        assert value("contrast", board).item() == pytest.approx(d / 2, rel=1e-5)
        assert value("entropy", board).item() == pytest.approx(1)
    for name in ("sharpness", "contrast"):
        top = make_reward(name).info.range[1]
        assert value(name, checkerboard()).item() == pytest.approx(top, rel=1e-5)


def test_pure_colours():
    """Saturated whatever their brightness, and no edges in them."""
    colours = torch.cat([flat(1, 0, 0), flat(0, 0.2, 0), flat(0, 0.5, 0.5), flat(1, 0.5, 0.5)])
    torch.testing.assert_close(value("saturation", colours), torch.tensor([1, 1, 1, 0.5]))
    for name in ("sharpness", "contrast", "entropy"):
        assert value(name, colours).abs().max() < 1e-6


def test_red_beside_green_has_the_contrast_of_their_lumas():
    image = flat(1, 0, 0).clone()
    image[..., 4:] = flat(0, 1, 0)[..., 4:]
    assert value("contrast", image).item() == pytest.approx((0.587 - 0.299) / 2, rel=1e-5)
    assert value("saturation", image).item() == 1


def test_entropy_of_all_levels_is_eight_bits():
    ramp = (torch.arange(256) / 255).view(1, 1, 16, 16).expand(1, 3, 16, 16)
    assert value("entropy", ramp).item() == pytest.approx(8)
    quarter = checkerboard()
    quarter[..., :4] = 0  # a quarter of the pixels is white
    expected = 0.25 * 2 + 0.75 * math.log2(4 / 3)
    assert value("entropy", quarter).item() == pytest.approx(expected)


# --------------------------------------------------------------------------------------------
# Other implementations
# --------------------------------------------------------------------------------------------


def test_sharpness_is_the_variance_of_scipys_laplacian():
    pixels = noise(3, 12, 17)
    expected = [ndimage.laplace(image @ RGB, mode="mirror").var() for image in pixels]
    torch.testing.assert_close(
        value("sharpness", pixels), torch.tensor(expected).float(), rtol=1e-4, atol=0
    )


def test_contrast_is_numpys_standard_deviation():
    pixels = noise(3, 12, 17)
    expected = [(image @ RGB / 255).std() for image in pixels]
    torch.testing.assert_close(
        value("contrast", pixels), torch.tensor(expected).float(), rtol=1e-4, atol=0
    )


def test_saturation_is_colorsys():
    pixels = noise(3, 12, 17)
    expected = [
        np.mean([colorsys.rgb_to_hsv(*pixel)[1] for pixel in image.reshape(-1, 3) / 255])
        for image in pixels
    ]
    torch.testing.assert_close(
        value("saturation", pixels), torch.tensor(expected).float(), rtol=1e-4, atol=0
    )


def test_entropy_is_pils():
    pixels = noise(3, 12, 17)
    expected = [Image.fromarray(image).convert("L").entropy() for image in pixels]
    torch.testing.assert_close(
        value("entropy", pixels), torch.tensor(expected).float(), rtol=0, atol=1e-4
    )


# --------------------------------------------------------------------------------------------
# Gradients and contract
# --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PROBES[:3])
@pytest.mark.parametrize("grey", [0.0, 0.3, 1.0])
def test_the_gradient_of_a_flat_image_is_finite(name, grey):
    data = flat(grey, grey, grey).clone().requires_grad_()
    (gradient,) = torch.autograd.grad(
        evaluate(make_reward(name), Samples(data, "image")).value.sum(), data
    )
    assert torch.isfinite(gradient).all()


@pytest.mark.parametrize("name", PROBES[:3])
def test_the_gradient_is_that_of_finite_differences(name):
    # distinct channels: the maximum over them is smooth nowhere else
    data = torch.rand(2, 3, 3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    functions = {
        "sharpness": lambda x: probes.laplacian_variance(x) / 1e4,
        "contrast": probes.rms_contrast,
        "saturation": probes.hsv_saturation,
    }
    assert torch.autograd.gradcheck(functions[name], data.requires_grad_())


def test_saturation_of_nearly_black_pixels_has_a_bounded_gradient():
    data = flat(1e-9, 0, 0, size=1).clone().requires_grad_()
    (gradient,) = torch.autograd.grad(probes.hsv_saturation(data).sum(), data)
    assert gradient.abs().max() <= 255 * (1 + 1e-5)


def test_blur_lowers_sharpness():
    sharp = noise(1, 16, 16).astype(np.float64)
    blurred = ndimage.gaussian_filter(sharp, (0, 1, 1, 0)).round().astype(np.uint8)
    assert value("sharpness", blurred) < 0.1 * value("sharpness", sharp.astype(np.uint8))


def test_sharpness_refuses_a_line_of_pixels():
    with pytest.raises(ValueError, match=r"two pixels a side, but images of \(1, 8\) came"):
        value("sharpness", torch.rand(1, 3, 1, 8))


@pytest.mark.parametrize("name", PROBES)
def test_probes_keep_the_contract(name):
    reward = make_reward(name)
    assert reward.info.licence and reward.info.source and reward.info.description
    images = torch.from_numpy(noise(4, 12, 17)).permute(0, 3, 1, 2) / 255
    check_reward(reward, Samples(images, "image", ["a", "b", "c", "d"]))
