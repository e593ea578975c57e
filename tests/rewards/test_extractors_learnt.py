"""Segmentation, depth and pose against rendered truth, closed forms and transformers itself."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

from diffreward.rewards.control import make_extractor
from diffreward.rewards.control_metrics import mean_iou
from diffreward.rewards.extractors_learnt import palette_of
from diffreward.rewards.shapes import COLOURS, SIZE, Item, Scene, _layout, coverage, render

NAMES = list(COLOURS)


def noise(*shape: int) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def drawn(number: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A picture, which colour covers each pixel (0: white), and where that is beyond doubt."""
    colours = [NAMES[(number + k) % len(NAMES)] for k in (0, 3)]
    scene = Scene((Item("circle", colours[0]), Item("heart", colours[1], 2)))
    picture = render(scene, np.random.default_rng(number))
    boxes = _layout(scene, np.random.default_rng(number))
    labels, sure = np.zeros((SIZE, SIZE), dtype=int), np.ones((SIZE, SIZE), dtype=bool)
    for item, box in zip((scene.items[0], scene.items[1], scene.items[1]), boxes, strict=True):
        alpha = coverage(item.shape, box)
        labels[alpha > 0.5] = 1 + NAMES.index(item.colour)
        sure &= (alpha == 0) | (alpha == 1)
    image = torch.from_numpy(picture).permute(2, 0, 1).double() / 255
    return image, torch.from_numpy(labels), torch.from_numpy(sure)


def scenes(count: int = 7) -> list[torch.Tensor]:
    return [torch.stack(some) for some in zip(*map(drawn, range(count)), strict=True)]


# --------------------------------------------------------------------------------------------
# Segmentation
# --------------------------------------------------------------------------------------------


def test_the_classes_of_rendered_scenes_are_those_that_were_drawn():
    images, labels, sure = scenes()
    read = make_extractor("segmentation")(images)
    assert read.shape == (7, 8, SIZE, SIZE)
    assert (read.argmax(1) == labels)[sure].all()
    # edges are mixtures: orange is between red and yellow, grey between black and white
    assert (read.argmax(1) == labels).double().mean() > 0.97
    assert (
        mean_iou(read.argmax(1).where(sure, -1).clamp(min=0), labels.where(sure, -1), 8).min() == 1
    )
    assert (read.softmax(1).amax(1)[sure] > 0.9).all()


def test_control_images_are_in_the_palettes_colours_and_read_back():
    images, labels, sure = scenes()
    extractor = make_extractor("segmentation")
    control = extractor.control(images)
    expected = np.array([(255, 255, 255), *COLOURS.values()])[extractor(images).argmax(1)]
    np.testing.assert_array_equal((255 * control).round().permute(0, 2, 3, 1), expected)
    target = extractor.target(control)
    assert target.dtype == torch.int64
    assert (target == labels)[sure].all()
    in_8_bits = (control * 255).round() / 255
    assert torch.equal(extractor.target(in_8_bits), target)


def test_a_pixel_far_from_every_colour_has_no_label():
    extractor = make_extractor("segmentation", palette=[(0, 0, 0), (255, 0, 0)])
    control = torch.zeros(1, 3, 1, 5)
    control[0, 0, 0] = torch.tensor([0.0, 0.09, 0.2, 0.85, 0.95])
    assert extractor.target(control).tolist() == [[[0, 0, -1, -1, 1]]]
    near = make_extractor("segmentation", palette=[(0, 0, 0), (10, 0, 0)])
    assert near.tolerance == pytest.approx(5 / 255)
    wide = make_extractor("segmentation", palette=[(0, 0, 0), (255, 0, 0)], tolerance=2)
    assert wide.target(control).tolist() == [[[0, 0, 0, 1, 1]]]


def test_logits_are_minus_squared_distances_over_the_temperature():
    images = noise(1, 3, 2, 2)
    logits = make_extractor("segmentation", temperature=0.5)(images)
    colours = np.array([(255, 255, 255), *COLOURS.values()]) / 255
    for k, colour in enumerate(colours):
        expected = -((images[0].permute(1, 2, 0).numpy() - colour) ** 2).sum(-1) / 0.5
        torch.testing.assert_close(logits[0, k], torch.from_numpy(expected), atol=1e-6, rtol=0)


def test_the_loss_is_the_cross_entropy_of_labelled_pixels():
    extractor = make_extractor("segmentation")
    logits = noise(2, 8, 3, 3)
    target = torch.randint(-1, 8, (2, 3, 3), generator=torch.Generator().manual_seed(1))
    log_p = torch.distributions.Categorical(logits=logits.permute(0, 2, 3, 1))
    expected = -log_p.log_prob(target.clamp(min=0)).where(target >= 0, 0.0)
    torch.testing.assert_close(extractor.loss(logits, target), expected)


def test_the_divergence_is_kl_of_the_second_from_the_first():
    extractor = make_extractor("segmentation")
    second, first = 3 * noise(2, 8, 4, 4), 3 * noise(2, 8, 4, 4).flip(0)
    q, p = (
        torch.distributions.Categorical(logits=logits.permute(0, 2, 3, 1))
        for logits in (second, first)
    )
    truth = torch.distributions.kl_divergence(q, p)
    torch.testing.assert_close(extractor.divergence(second, first), truth)
    assert not torch.allclose(truth, torch.distributions.kl_divergence(p, q))
    torch.testing.assert_close(extractor.divergence(first, first), torch.zeros(2, 4, 4).double())


def test_the_default_palette_of_a_network_is_pascal_vocs():
    published = [(0, 0, 0), (128, 0, 0), (0, 128, 0), (128, 128, 0), (0, 0, 128), (128, 0, 128)]
    published += [(0, 128, 128), (128, 128, 128), (64, 0, 0)]
    assert (255 * palette_of(256)).round().tolist()[:9] == [list(map(float, c)) for c in published]
    assert (255 * palette_of(256)[255]).round().tolist() == [224, 224, 192]
    assert len(palette_of(256).unique(dim=0)) == 256
    extractor = make_extractor("segmentation", model=nn.Conv2d(3, 5, 1), classes=5)
    torch.testing.assert_close(extractor.palette, palette_of(5))


def test_classes_that_do_not_fit_are_named():
    model = nn.Conv2d(3, 5, 1)
    images = torch.rand(1, 3, 4, 4)
    for options, match in [
        ({"model": model}, "give classes, or a palette"),
        ({"model": model, "classes": 300}, "256 colours, but there are 300 classes"),
        ({"model": model, "classes": 3, "palette": [(0, 0, 0)]}, "has 1 colours, .* 3 classes"),
        ({"palette": [(0, 0), (1, 1)]}, r"three numbers for each class, .* \(2, 2\) came"),
        ({"palette": [(0, 0, 300)]}, r"in 0 .. 255"),
        ({"palette": "ade"}, "'shapes', 'voc' or a list of colours, but 'ade' came"),
        ({"model": model, "classes": 5, "palette": "shapes"}, "has 8 colours, .* 5 classes"),
        ({"palette": [(0, 0, 3), (0, 0, 3)]}, "the same colour"),
        ({"temperature": 0}, "temperature .* positive"),
    ]:
        with pytest.raises(ValueError, match=match):
            make_extractor("segmentation", **options)
    with pytest.raises(ValueError, match="logits of 5 classes, but its palette has 4 colours"):
        make_extractor("segmentation", model=model, classes=4)(images)
    extractor = make_extractor("segmentation")
    with pytest.raises(ValueError, match="has the label 8, but .* logits of 8 classes, 0 to 7"):
        extractor.loss(torch.zeros(1, 8, 4, 4), torch.full((1, 4, 4), 8))


# --------------------------------------------------------------------------------------------
# Depth
# --------------------------------------------------------------------------------------------


def first_channel(images):
    return images[:, 0]


def test_depth_is_compared_up_to_scale_and_shift():
    depth = make_extractor("depth", model=first_channel)
    a, b = noise(2, 1, 9, 9), noise(2, 1, 9, 9).flip(0)
    loss, spread = depth.loss(a, b), depth.divergence(a, b)
    for scale, shift in ((7, 0), (0.01, 3), (50, -20)):
        torch.testing.assert_close(depth.loss(scale * a + shift, b), loss)
        torch.testing.assert_close(depth.loss(a, scale * b + shift), loss)
        torch.testing.assert_close(depth.divergence(scale * a + shift, b), spread)
        assert depth.loss(scale * a + shift, a).max() < 1e-9
    # upside down is not the same
    assert depth.loss(-a, a).mean() > 1
    for x in (a, b):
        off = x.numpy() - np.median(x.numpy(), axis=(1, 2, 3), keepdims=True)
        x.copy_(torch.from_numpy(off / np.abs(off).mean(axis=(1, 2, 3), keepdims=True)))
    torch.testing.assert_close(loss, (a - b).abs()[:, 0])


def test_the_depth_of_one_picture_does_not_see_the_others():
    depth = make_extractor("depth", model=first_channel)
    a, b = noise(3, 1, 8, 8), noise(3, 1, 8, 8).flip(0)
    torch.testing.assert_close(depth.loss(a, b)[:1], depth.loss(a[:1], b[:1]))


def test_depth_of_a_flat_map_is_zero_and_has_a_finite_gradient():
    depth = make_extractor("depth", model=first_channel)
    images = torch.full((1, 3, 6, 6), 0.5, requires_grad=True)
    loss = depth.loss(depth(images), torch.rand(1, 1, 6, 6))
    (gradient,) = torch.autograd.grad(loss.sum(), images)
    assert torch.isfinite(loss).all() and torch.isfinite(gradient).all()
    assert depth.control(images).abs().max() == 0


def test_the_control_image_of_depth_is_white_where_near():
    images = noise(2, 3, 6, 6)
    relative = make_extractor("depth", model=first_channel).control(images)
    metric = make_extractor("depth", model=first_channel, metric=True).control(images)
    for control, near in (
        (relative, images[:, 0].amax((1, 2))),
        (metric, images[:, 0].amin((1, 2))),
    ):
        for i in range(2):
            assert control[i].min() == 0 and control[i].max() == 1
            assert control[i, 0][images[i, 0] == near[i]] == 1
            assert torch.equal(control[i, 0], control[i, 2])


# --------------------------------------------------------------------------------------------
# Pose
# --------------------------------------------------------------------------------------------


def heat(points, h=24, w=20):
    y, x = torch.meshgrid(torch.arange(h).double(), torch.arange(w).double(), indexing="ij")
    maps = [torch.exp(-((x - px) ** 2 + (y - py) ** 2) / 4) for px, py in points]
    return torch.stack(maps)[None]


def test_heat_maps_are_read_back_from_their_control_image():
    points = [(4, 4), (14, 5), (5, 18), (15, 18), (10, 11), (1, 11)]
    maps = heat(points)
    pose = make_extractor("pose", model=lambda images: maps, keypoints=6)
    control = pose.control(torch.zeros(1, 3, 24, 20))
    assert control.shape == (1, 3, 24, 20) and control.max() == 1
    back = pose.target((control * 255).round() / 255)
    assert back.shape == maps.shape
    strongest = maps == maps.amax(1, keepdim=True)
    assert (back - maps).abs()[strongest].max() < 0.05  # faint colours lose their hue in 8 bits
    assert (back - maps).abs().max() < 0.15  # where they overlap, the weaker is lost
    for k, (x, y) in enumerate(points):
        assert divmod(int(back[0, k].argmax()), 20) == (y, x)
    assert pose.loss(maps, maps).abs().max() == 0
    torch.testing.assert_close(pose.loss(maps, back), ((maps - back) ** 2).mean(1))


def test_left_and_right_change_places_in_a_mirror():
    maps = heat([(4, 4), (14, 5), (9, 18)])
    pose = make_extractor("pose", model=lambda images: maps, keypoints=3, pairs=[(0, 1)])
    torch.testing.assert_close(pose.unflip(maps), heat([(5, 5), (15, 4), (10, 18)]))
    assert "flip" in pose.augmentations
    unknown = make_extractor("pose", model=lambda images: maps, keypoints=3)
    assert "flip" not in unknown.augmentations
    coco = make_extractor("pose", model=lambda images: maps)
    assert coco.mirrored == [0, 2, 1, 4, 3, 6, 5, 8, 7, 10, 9, 12, 11, 14, 13, 16, 15]


def test_a_wrong_number_of_key_points_is_named():
    with pytest.raises(ValueError, match=r"name key-points 0 to 2, but \(0, 3\) came"):
        make_extractor("pose", model=first_channel, keypoints=3, pairs=[(0, 3)])
    with pytest.raises(ValueError, match="keypoints .* 0 came"):
        make_extractor("pose", model=first_channel, keypoints=0)
    with pytest.raises(ValueError, match=r"expected floating point \(1, 17, h, w\)"):
        make_extractor("pose", model=lambda images: images)(torch.rand(1, 3, 4, 4))


# --------------------------------------------------------------------------------------------
# Gradients and networks of transformers
# --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "channels", "options"),
    [
        ("segmentation", 5, {"classes": 5}),
        ("depth", 1, {}),
        ("depth", 1, {"metric": True}),
        ("pose", 3, {"keypoints": 3}),
        ("edges", 1, {}),
        ("lineart", 1, {}),
    ],
)
def test_the_gradient_through_a_network_is_that_of_finite_differences(name, channels, options):
    torch.manual_seed(0)
    module = nn.Sequential(
        nn.Conv2d(3, 6, 3, 2, 1), nn.Tanh(), nn.Conv2d(6, channels, 1), nn.Softplus()
    )
    extractor = make_extractor(name, model=module.double(), **options)
    images, control = noise(1, 3, 8, 8), noise(1, 3, 8, 8).flip(-1)
    target = extractor.target(extractor.control(control))
    images.requires_grad_()
    loss = lambda images: extractor.loss(extractor(images), target).sum()  # noqa: E731
    (gradient,) = torch.autograd.grad(loss(images), images)
    assert gradient.abs().max() > 1e-5
    for index in np.random.default_rng(0).choice(images.numel(), 12, replace=False):
        moved = torch.zeros_like(images).flatten()
        moved[index] = 1e-6
        moved = moved.view_as(images)
        with torch.no_grad():
            slope = (loss(images + moved) - loss(images - moved)) / 2e-6
        torch.testing.assert_close(slope, gradient.flatten()[index], rtol=1e-4, atol=1e-7)


def segformer():
    import transformers as t

    config = t.SegformerConfig(
        num_encoder_blocks=2,
        depths=[1, 1],
        sr_ratios=[2, 1],
        hidden_sizes=[8, 16],
        patch_sizes=[3, 3],
        strides=[2, 2],
        num_attention_heads=[1, 2],
        mlp_ratios=[2, 2],
        decoder_hidden_size=16,
        num_labels=8,
    )
    processor = t.SegformerImageProcessor(size={"height": 32, "width": 32})
    return t.SegformerForSemanticSegmentation(config), processor, (32, 32), "logits"


def dpt():
    import transformers as t

    config = t.DPTConfig(
        hidden_size=16,
        num_hidden_layers=4,
        num_attention_heads=2,
        intermediate_size=16,
        image_size=32,
        patch_size=8,
        backbone_out_indices=[0, 1, 2, 3],
        neck_hidden_sizes=[8, 8, 8, 8],
        fusion_hidden_size=8,
        is_hybrid=False,
    )
    processor = t.DPTImageProcessor(size={"height": 32, "width": 32})
    return t.DPTForDepthEstimation(config), processor, (32, 32), "predicted_depth"


def vitpose():
    import transformers as t

    backbone = t.VitPoseBackboneConfig(
        image_size=[32, 24],
        patch_size=[8, 8],
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        mlp_ratio=2,
        out_features=["stage1"],
    )
    config = t.VitPoseConfig(backbone_config=backbone, num_labels=4, scale_factor=2)
    processor = t.VitPoseImageProcessor(size={"height": 32, "width": 24})
    return t.VitPoseForPoseEstimation(config), processor, (32, 24), "heatmaps"


@pytest.mark.parametrize(
    ("name", "make", "options"),
    [("segmentation", segformer, {}), ("depth", dpt, {}), ("pose", vitpose, {"keypoints": 4})],
)
def test_networks_of_transformers_are_read_as_transformers_reads_them(
    name, make, options, tmp_path
):
    torch.manual_seed(0)
    network, processor, size, output = make()
    network.eval().save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    pixels = np.random.default_rng(0).integers(0, 256, (2, *size, 3), dtype=np.uint8)
    images = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255
    extractor = make_extractor(name, model=str(tmp_path), **options)
    assert extractor.weights == str(tmp_path)
    if name == "pose":  # its processor cuts out persons; only its mean and std are asked
        mean, std = (
            torch.tensor(x).view(3, 1, 1) for x in (processor.image_mean, processor.image_std)
        )
        inputs = {"pixel_values": (images - mean) / std}
    else:
        inputs = processor([Image.fromarray(image) for image in pixels], return_tensors="pt")
    with torch.no_grad():
        truth = getattr(network(**inputs), output)
    truth = truth[:, None] if truth.ndim == 3 else truth
    truth = F.interpolate(truth, size=size, mode="bilinear")
    torch.testing.assert_close(extractor(images), truth, atol=1e-4, rtol=1e-4)
    # pictures of another size, and the gradient to them
    larger = torch.rand(1, 3, 40, 48, requires_grad=True)
    target = extractor.target(extractor.control(larger.detach().flip(-1)))
    loss = extractor.loss(extractor(larger), target)
    assert loss.shape == (1, 40, 48)
    (gradient,) = torch.autograd.grad(loss.sum(), larger)
    assert torch.isfinite(gradient).all() and gradient.abs().max() > 0


def test_a_checkpoint_that_is_not_whole_is_refused(tmp_path):
    from safetensors.torch import load_file, save_file

    with pytest.raises(FileNotFoundError, match="there is no folder"):
        make_extractor("depth", model="./nowhere")
    with pytest.raises(FileNotFoundError, match="image processor"):
        make_extractor("depth", model=str(tmp_path))
    network, processor, *_ = segformer()
    network.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="has 1 colours, but the model has 8 classes"):
        make_extractor("segmentation", model=str(tmp_path), palette=[(0, 0, 0)])
    own = make_extractor("segmentation", model=str(tmp_path), size="picture")
    assert own.network.size is None and own.network.mean is not None
    weights = load_file(tmp_path / "model.safetensors")
    kept = {key: value for key, value in weights.items() if "classifier" not in key}
    save_file(kept, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"lacks 2 weights .* decode_head.classifier"):
        make_extractor("segmentation", model=str(tmp_path))
