"""Judges of control against scikit-image, brute force and closed forms."""

import numpy as np
import pytest
import torch
from scipy import ndimage

from diffreward.rewards import evaluate, make_reward
from diffreward.rewards.control import make_extractor
from diffreward.rewards.control_metrics import edge_f1, mean_iou, rmse, ssim
from diffreward.rewards.shapes import random_scene, render
from diffreward.rewards.testing import check_reward
from diffreward.samples import Samples

JUDGES = {
    "control_miou": "segmentation",
    "control_edge_f1": "canny",
    "control_ssim": "edges",
    "control_rmse": "luma",
}


@pytest.fixture(scope="module")
def images():
    found = []
    for i in range(4):
        rng = np.random.default_rng([3, i])
        found.append(render(random_scene(rng), rng))
    return torch.from_numpy(np.stack(found)).permute(0, 3, 1, 2).float() / 255


def shown(images, control):
    return Samples(images, "image", context={"control": control})


def test_mean_iou_is_that_of_sets_of_pixels():
    rng = np.random.default_rng(0)
    labels, target = rng.integers(0, 5, (3, 9, 8)), rng.integers(-1, 4, (3, 9, 8))
    target[2] = np.where(target[2] < 2, target[2], 0)
    found = mean_iou(torch.from_numpy(labels), torch.from_numpy(target), 7)
    for i in range(3):
        counts = target[i] >= 0
        values = []
        for k in range(7):
            a, b = (labels[i] == k) & counts, (target[i] == k) & counts
            if (a | b).any():
                values.append((a & b).sum() / (a | b).sum())
        assert found[i].item() == pytest.approx(np.mean(values), abs=1e-6)


def test_mean_iou_of_known_maps():
    a = torch.tensor([[[0, 0, 1, 1]]])
    assert mean_iou(a, a, 5).item() == 1
    assert mean_iou(a, 2 + a, 5).item() == 0
    assert mean_iou(a, torch.tensor([[[0, 0, 0, 1]]]), 5).item() == pytest.approx(
        (2 / 3 + 1 / 2) / 2
    )
    assert mean_iou(a, torch.tensor([[[0, -1, -1, 1]]]), 5).item() == 1
    assert mean_iou(a, torch.full_like(a, -1), 5).isnan()
    with pytest.raises(ValueError, match=r"target are in 0 .. 1, but 0 .. 2 came"):
        mean_iou(a, torch.tensor([[[0, 2, 1, 1]]]), 2)
    with pytest.raises(ValueError, match=r"labels are in 0 .. 0, but 0 .. 1 came"):
        mean_iou(a, torch.zeros_like(a), 1)


@pytest.mark.parametrize("tolerance", [0, 1, 2])
def test_edge_f1_is_that_of_distances_to_the_nearest_edge(tolerance):
    rng = np.random.default_rng(0)
    a, b = rng.random((4, 15, 12)) < 0.03, rng.random((4, 15, 12)) < 0.05
    found = edge_f1(torch.from_numpy(a), torch.from_numpy(b), tolerance)
    for i in range(4):
        near_b, near_a = (
            ndimage.distance_transform_cdt(~x[i], metric="chessboard") <= tolerance for x in (b, a)
        )
        precision, recall = near_b[a[i]].mean(), near_a[b[i]].mean()
        truth = 0 if precision + recall == 0 else 2 * precision * recall / (precision + recall)
        assert found[i].item() == pytest.approx(truth, abs=1e-6)


def test_edge_f1_of_known_maps():
    line, none = torch.zeros(1, 9, 9, dtype=torch.bool), torch.zeros(1, 9, 9, dtype=torch.bool)
    line[:, :, 4] = True
    for other, tolerance, truth in [
        (line, 0, 1),
        (line.roll(1, 2), 1, 1),
        (line.roll(1, 2), 0, 0),
        (line.roll(2, 2), 1, 0),
        (none, 1, 0),
    ]:
        assert edge_f1(line, other, tolerance).item() == truth
    assert edge_f1(none, none).item() == 1
    half = line.clone()
    half[:, 3:] = False
    # all of the half is right; of the line, the half and, within 1, one pixel more
    assert edge_f1(half, line).item() == pytest.approx(2 * (4 / 9) / (1 + 4 / 9))
    with pytest.raises(ValueError, match="tolerance .* but -1 came"):
        edge_f1(line, line, -1)


def test_ssim_is_scikit_images():
    """skimage.metrics.structural_similarity of 0.26.0, with its settings after Wang et al.

    data_range=1, gaussian_weights=True, sigma=1.5, use_sample_covariance=False.
    """
    rng = np.random.default_rng(7)
    a = rng.random((2, 1, 24, 20))
    b = np.clip(a + 0.2 * rng.standard_normal(a.shape), 0, 1)
    found = ssim(torch.from_numpy(a), torch.from_numpy(b))
    truth = torch.tensor([0.8514833778191355, 0.8374771394471683], dtype=torch.float64)
    torch.testing.assert_close(found, truth, atol=1e-10, rtol=0)
    in_32_bits = ssim(torch.from_numpy(a).float(), torch.from_numpy(b).float())
    torch.testing.assert_close(in_32_bits, truth.float(), atol=1e-5, rtol=0)


def test_ssim_of_flat_images_is_their_lumas_term():
    a, b = torch.full((1, 3, 11, 11), 0.2), torch.full((1, 3, 11, 11), 0.6)
    expected = (2 * 0.2 * 0.6 + 1e-4) / (0.2**2 + 0.6**2 + 1e-4)
    assert ssim(a, b).item() == pytest.approx(expected, abs=1e-4)
    assert ssim(a, a).item() == pytest.approx(1)
    with pytest.raises(ValueError, match="window is 11x11, but images of 10x12 came"):
        ssim(torch.rand(1, 1, 10, 12), torch.rand(1, 1, 10, 12))


def test_rmse_is_in_units_of_8_bits():
    a = 0.5 * torch.rand(2, 3, 4, 4)
    torch.testing.assert_close(rmse(a + 10 / 255, a), torch.tensor([10.0, 10.0]))
    mixed = a.clone()
    mixed[:, :, :2] += 30 / 255  # half of the pixels
    torch.testing.assert_close(rmse(mixed, a), torch.full((2,), 30 / 2**0.5))


@pytest.mark.parametrize(("name", "extractor"), JUDGES.items())
def test_judges_prefer_pictures_that_keep_their_condition(name, extractor, images):
    judge = make_reward(name)
    control = make_extractor(extractor).control(images)
    best = 0 if name == "control_rmse" else 1
    own = evaluate(judge, shown(images, control)).value
    torch.testing.assert_close(own, torch.full((4,), float(best)), atol=1e-4, rtol=0)
    assert (evaluate(judge, shown(images.flip(0), control)).value < own - 0.1).all()
    assert judge.info.differentiable is False
    check_reward(judge, shown(images, control.flip(0)))


def test_a_judge_may_read_with_another_extractor(images):
    reader = make_extractor("segmentation", temperature=0.3)
    control = make_extractor("segmentation").control(images)
    judge = make_reward("control_miou", extractor=reader)
    assert evaluate(judge, shown(images, control)).value.min() == 1

    def wrong(images):  # everything is background
        return torch.eye(8)[0].view(1, 8, 1, 1).expand(len(images), 8, *images.shape[-2:])

    spec = {"name": "segmentation", "model": wrong, "palette": "shapes"}
    value = evaluate(make_reward("control_miou", extractor=spec), shown(images, control)).value
    target = reader.target(control)
    white = (target == 0).flatten(1).float().mean(1)
    classes = torch.tensor([len(t.unique()) for t in target])
    torch.testing.assert_close(value, white / classes)

    depth = {"name": "depth", "model": lambda images: images[:, :1]}
    judge = make_reward("control_rmse", extractor=depth)
    control = make_extractor(depth).control(images)
    torch.testing.assert_close(
        evaluate(judge, shown(0.5 * images + 0.2, control)).value, torch.zeros(4), atol=1e-3, rtol=0
    )
    value = evaluate(judge, shown(images, (control - 20 / 255).clamp(min=0))).value
    assert ((value < 0) & (value >= -20.001)).all()


def test_colour_control_images_are_compared_in_colour(images):
    control = make_extractor("colour").control(images)
    swapped = control[:, [1, 0, 2]]
    expected = -255 * (control - swapped).square().mean((1, 2, 3)).sqrt()
    value = evaluate(make_reward("control_rmse", extractor="colour"), shown(images, swapped)).value
    torch.testing.assert_close(value, expected)


def test_edges_of_control_images_are_pixels_of_a_half_or_more():
    white, control = torch.ones(3, 3, 16, 16), torch.zeros(3, 3, 16, 16)
    for k, grey in enumerate((0.45, 0.5, 1.0)):
        control[k, :, 8] = grey
    value = evaluate(make_reward("control_edge_f1"), shown(white, control)).value
    assert value.tolist() == [1, 0, 0]  # a picture without edges


def test_what_a_judge_cannot_read_is_named(images):
    with pytest.raises(ValueError, match="extractor 'luma' reads none; give a segmentation"):
        make_reward("control_miou", extractor="luma")
    with pytest.raises(ValueError, match="no pixel of control image 0 has a colour"):
        control = torch.full_like(images, 0.5)
        evaluate(make_reward("control_miou"), shown(images, control))
    control = torch.ones_like(images)
    control[1] = 0.5  # the others can be read
    with pytest.raises(ValueError, match="no pixel of control image 1 has a colour"):
        evaluate(make_reward("control_miou"), shown(images, control))
    with pytest.raises(ValueError, match="tolerance .* but -1 came"):
        make_reward("control_edge_f1", tolerance=-1)
    with pytest.raises(ValueError, match="low .* at most high"):
        make_reward("control_edge_f1", low=0.5)
    small = torch.rand(1, 3, 10, 10)
    with pytest.raises(ValueError, match="window is 11x11, but images of 10x10"):
        evaluate(make_reward("control_ssim"), shown(small, small))
