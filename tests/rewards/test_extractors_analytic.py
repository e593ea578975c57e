"""Edges, lines and coarse colours against scipy, brute force and closed forms."""

import math

import numpy as np
import pytest
import torch
from scipy import ndimage

from diffreward.rewards.control import make_extractor
from diffreward.rewards.extractors_analytic import canny_edges, slopes, sobel
from diffreward.rewards.shapes import random_scene, render

ANALYTIC = ["edges", "canny", "lineart", "luma", "colour", "segmentation"]


def scenes(count: int) -> torch.Tensor:
    found = []
    for i in range(count):
        rng = np.random.default_rng([1, i])
        found.append(render(random_scene(rng), rng))
    return torch.from_numpy(np.stack(found)).permute(0, 3, 1, 2).double() / 255


def noise(*shape: int) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def grey(images: torch.Tensor) -> np.ndarray:
    red, green, blue = images.numpy().transpose(1, 0, 2, 3)
    return 0.299 * red + 0.587 * green + 0.114 * blue


def blurred(image: np.ndarray, sigma: float, radius: int) -> np.ndarray:
    return ndimage.gaussian_filter(image, sigma, mode="nearest", radius=radius)


def close(found, expected, atol=1e-9):
    torch.testing.assert_close(found, torch.from_numpy(np.asarray(expected)), atol=atol, rtol=0)


def test_sobel_is_scipys():
    x = noise(3, 1, 9, 7)
    right, down = sobel(x)
    # scipy's adds up to 8 times the slope per pixel
    for found, axis in ((right, 1), (down, 0)):
        truth = [ndimage.sobel(image, axis=axis, mode="nearest") / 8 for image in x[:, 0].numpy()]
        close(found[:, 0], np.stack(truth))


@pytest.mark.parametrize("sigma", [0.7, 1.0, 1.4])
def test_edges_are_the_steepness_of_the_blurred_luma(sigma):
    images = noise(2, 3, 14, 11)
    truth = []
    for image in grey(images):
        smooth = blurred(image, sigma, 2)
        truth.append([ndimage.sobel(smooth, axis=axis, mode="nearest") for axis in (1, 0)])
    truth = np.array(truth)
    # as measured on the steepest step of all, between black and white at some angle
    y, x = np.mgrid[-10:11, -10:11]
    steps = [
        np.hypot(*(ndimage.sobel(blurred(step, sigma, 2), axis=a) for a in (0, 1)))[10, 10]
        for step in (
            (np.cos(t) * x + np.sin(t) * y > s).astype(float)
            for t in np.linspace(0, np.pi / 2, 91)
            for s in (-0.5, 0.0, 0.5)
        )
    ]
    strength = np.hypot(truth[:, 0], truth[:, 1]) / max(steps)
    expected = np.sqrt(strength**2 + 1e-6) - 1e-3
    # the angles that are tried differ a little
    close(make_extractor("edges", sigma=sigma)(images)[:, 0], expected, atol=2e-3)


def test_edges_are_at_most_one_and_none_where_nothing_is():
    edges = make_extractor("edges")
    half = torch.zeros(1, 3, 16, 16)
    half[..., 8:] = 1
    checks = (noise(8, 3, 12, 12) > 0.5).float()
    assert edges(checks).max() <= 1
    assert 0.9 < edges(half).max() <= 1
    assert torch.equal(edges(half)[..., :4], torch.zeros(1, 1, 16, 4))
    control = edges.control(half)
    assert control.shape == (1, 3, 16, 16) and 0 <= control.min() and control.max() <= 1
    torch.testing.assert_close(edges.target(control), edges(half))


def canny_truth(image: np.ndarray, low: float, high: float) -> np.ndarray:
    """Pixel by pixel, from the slopes."""
    right, down = (s[0, 0].numpy() for s in slopes(torch.from_numpy(image)[None], 1.0))
    strength = np.sqrt(right**2 + down**2 + 1e-6) - 1e-3
    padded = np.pad(strength, 1, mode="edge")
    weak = np.zeros(strength.shape, dtype=bool)
    for i, j in np.ndindex(strength.shape):
        dx, dy = right[i, j], down[i, j]
        sx, sy = (1 if dx > 0 else -1), (1 if dy > 0 else -1)
        share = min(abs(dx), abs(dy)) / (max(abs(dx), abs(dy)) + 1e-6)
        straight = (sy, 0) if abs(dy) > abs(dx) else (0, sx)
        sides = []
        for s in (1, -1):
            a = padded[1 + i + s * straight[0], 1 + j + s * straight[1]]
            b = padded[1 + i + s * sy, 1 + j + s * sx]
            sides.append((1 - share) * a + share * b)
        here = strength[i, j]
        weak[i, j] = here > low and here > sides[0] + 1e-12 and here >= sides[1] - 1e-12
    labels, _ = ndimage.label(weak, np.ones((3, 3)))
    return np.isin(labels, np.unique(labels[weak & (strength > high)])) & weak


def test_hard_edges_are_cannys():
    images = torch.cat([scenes(3), 0.5 * noise(2, 3, 64, 64) + 0.2])
    found = canny_edges(images, 0.05, 0.12)
    for edges, image in zip(found, images, strict=True):
        truth = canny_truth(image.numpy(), 0.05, 0.12)
        assert (edges.numpy() != truth).mean() < 1e-3  # ties, to round-off
        assert 0 < truth.mean() < 0.5
    # hysteresis matters in the noise: both thresholds alone give something else
    for low, high in ((0.05, 0.05), (0.12, 0.12)):
        assert (canny_edges(images, low, high)[3:] != found[3:]).float().mean() > 0.01


def test_an_edge_is_one_pixel_thin_at_any_angle():
    y, x = torch.meshgrid(*(torch.arange(41.0) - 20,) * 2, indexing="ij")
    disc = torch.sigmoid(4 * (12.3 - (x**2 + y**2).sqrt()))
    edges = canny_edges(disc.expand(1, 3, -1, -1))[0]
    radius = (x**2 + y**2).sqrt()[edges]
    assert ((radius - 12.3).abs() < 1).all()
    # an 8-connected circle has 4 sqrt(2) r pixels, a 4-connected one 8 r
    assert 4 * math.sqrt(2) * 12 * 0.95 < edges.sum() < 8 * 12.3
    _, pieces = ndimage.label(edges.numpy(), np.ones((3, 3)))
    assert pieces == 1


def test_soft_canny_is_near_the_hard_one_and_hard_has_no_gradient():
    images = scenes(4)
    soft, hard = make_extractor("canny"), make_extractor("canny", hard=True)
    assert soft.differentiable and hard.differentiable is False
    edges = hard(images)
    assert set(edges.unique().tolist()) == {0, 1}
    assert not hard(images.requires_grad_()).requires_grad
    assert ((soft(images) > 0.5) == (edges > 0.5)).double().mean() > 0.99
    for each in (soft, hard):
        torch.testing.assert_close(each.control(images), edges.expand(-1, 3, -1, -1))


def test_lineart_is_a_difference_of_gaussians():
    images = noise(2, 3, 15, 18)
    fine, wide = (
        np.stack([blurred(image, sigma, 5) for image in grey(images)]) for sigma in (1.0, 1.6)
    )
    close(make_extractor("lineart")(images)[:, 0], np.tanh(10 * np.maximum(0, wide - fine)))


def test_lineart_sees_dark_lines_and_not_light_ones():
    line = torch.ones(1, 3, 21, 21)
    line[..., 10] = 0
    found = make_extractor("lineart")(torch.cat([line, 1 - line]))
    assert found[0, 0, 10, 10] > 0.85 and found[0, 0, 10, 2] < 0.01
    assert found[1, 0, 10, 10] == 0


def test_a_network_takes_the_place_of_the_filter():
    images = noise(2, 3, 8, 8)
    model = lambda images: images[:, :1]  # noqa: E731
    for name in ("edges", "lineart"):
        extractor = make_extractor(name, model=model)
        assert torch.equal(extractor(images), images[:, :1]) and "darker" in extractor.augmentations
    dark = make_extractor("lineart", model=model, dark_lines=True)
    torch.testing.assert_close(dark(images), 1 - images[:, :1])


@pytest.mark.parametrize(("size", "cells"), [((16, 16), 4), ((13, 10), 4), ((5, 6), 8)])
def test_luma_and_colour_are_means_over_cells(size, cells):
    images = noise(2, 3, *size)
    expected = images.numpy().copy()
    edges = [[math.ceil(k * side / cells) for k in range(cells + 1)] for side in size]
    for top, bottom in zip(edges[0], edges[0][1:], strict=False):
        for left, right in zip(edges[1], edges[1][1:], strict=False):
            if top < bottom and left < right:
                part = expected[..., top:bottom, left:right]
                part[:] = part.mean(axis=(2, 3), keepdims=True)
    colour, luma = make_extractor({"colour": cells}), make_extractor({"luma": cells})
    close(colour(images), expected)
    close(luma(images)[:, 0], grey(torch.from_numpy(expected)))
    torch.testing.assert_close(colour.target(colour.control(images)), colour(images))
    torch.testing.assert_close(luma.target(luma.control(images)), luma(images))
    assert luma.control(images).shape == images.shape


@pytest.mark.parametrize("distance", ["mse", "l1"])
def test_a_constant_shift_has_a_constant_loss(distance):
    images = 0.8 * noise(2, 3, 16, 16)
    for name in ("luma", "colour"):
        extractor = make_extractor(name, distance=distance)
        loss = extractor.loss(extractor(images + 0.2), extractor(images))
        torch.testing.assert_close(loss, torch.full_like(loss, 0.2 if distance == "l1" else 0.04))


@pytest.mark.parametrize("name", ANALYTIC)
def test_the_gradient_is_that_of_finite_differences(name):
    extractor = make_extractor(name)
    images = (0.1 + 0.8 * noise(1, 3, 8, 9)).requires_grad_()
    target = extractor.target(extractor.control(images.detach().flip(-1)))
    loss = lambda images: extractor.loss(extractor(images), target).sum(dim=(1, 2))  # noqa: E731
    (gradient,) = torch.autograd.grad(loss(images).sum(), images)
    assert torch.isfinite(gradient).all() and gradient.abs().max() > 1e-3
    step = 1e-6
    for index in np.random.default_rng(0).choice(images.numel(), 25, replace=False):
        moved = torch.zeros_like(images).flatten()
        moved[index] = step
        moved = moved.view_as(images)
        with torch.no_grad():
            slope = (loss(images + moved) - loss(images - moved)) / (2 * step)
        expected = gradient.flatten()[index]
        torch.testing.assert_close(slope[0], expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ANALYTIC)
def test_a_flat_picture_has_a_finite_gradient(name):
    extractor = make_extractor(name)
    images = torch.full((1, 3, 9, 9), 0.5, requires_grad=True)
    (gradient,) = torch.autograd.grad(extractor(images).square().sum(), images)
    assert torch.isfinite(gradient).all()


def test_options_out_of_range_are_named():
    for spec, match in [
        ({"edges": {"sigma": 0}}, "sigma of extractor 'edges' must be positive"),
        ({"canny": {"softness": -1}}, "softness of extractor 'canny' must be positive"),
        ({"canny": {"low": 0.3, "high": 0.2}}, "low .* at most high, but low=0.3, high=0.2"),
        ({"lineart": {"strength": math.inf}}, "strength .* finite"),
        ({"lineart": {"dark_lines": True}}, "dark_lines .* none came"),
        ({"luma": {"cells": 0}}, "cells of extractor 'luma' must be at least 1, but 0 came"),
    ]:
        with pytest.raises(ValueError, match=match):
            make_extractor(spec)
