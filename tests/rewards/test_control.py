"""Condition rewards against independent computations; opinions, gradients and messages."""

import dataclasses

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from diffreward.rewards import Scores, evaluate, make_reward
from diffreward.rewards.control import ControlReward, make_extractor, read_control
from diffreward.rewards.extractors import Extractor
from diffreward.rewards.shapes import random_scene, render
from diffreward.rewards.testing import check_reward
from diffreward.samples import Samples

WITHOUT_NETWORKS = ["edges", "canny", "lineart", "segmentation", "luma", "colour"]


@pytest.fixture(scope="module")
def images():
    found = []
    for i in range(4):
        rng = np.random.default_rng([4, i])
        found.append(render(random_scene(rng), rng))
    return torch.from_numpy(np.stack(found)).permute(0, 3, 1, 2).float() / 255


def shown(images, control):
    return Samples(images, "image", context={"control": control})


class Channel(Extractor):
    """One channel as it is, times a factor."""

    def __init__(self, number=0, factor=1.0, **options):
        self.name, self.number, self.factor = f"channel {number}", number, factor
        super().__init__(**options)

    def __call__(self, images):
        return self.factor * images[:, self.number : self.number + 1]


def network(channels=1, seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.ReLU(),
        nn.Dropout(0.5),
        nn.Conv2d(8, channels, 1),
        nn.Sigmoid(),
    )


# --------------------------------------------------------------------------------------------
# Values
# --------------------------------------------------------------------------------------------


def test_the_reward_is_minus_the_mean_loss(images):
    control = torch.rand(4, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    value = evaluate(ControlReward(Channel(1)), shown(images, control)).value
    expected = -(images[:, 1] - control.mean(1)).square().mean((1, 2))
    torch.testing.assert_close(value, expected)
    value = evaluate(ControlReward(Channel(1, distance="l1")), shown(images, control[:, :1])).value
    torch.testing.assert_close(value, -(images[:, 1] - control[:, 0]).abs().mean((1, 2)))


@pytest.mark.parametrize("name", WITHOUT_NETWORKS)
def test_rewards_keep_the_contract_and_prefer_the_condition(name, images):
    reward, extractor = make_reward(f"control_{name}"), make_extractor(name)
    control = extractor.control(images)
    assert control.shape == images.shape and 0 <= control.min() and control.max() <= 1
    own = evaluate(reward, shown(images, control)).value
    other = evaluate(reward, shown(images.flip(0), control)).value
    assert (own > other).all() and (own > -0.02).all()
    assert reward.info.differentiable and reward.info.name == f"control_{name}"
    mixed = (0.6 * images + 0.4 * torch.rand(4, 3, 64, 64)).clamp(0, 1)
    check_reward(reward, shown(mixed, control.flip(0)))


@pytest.mark.parametrize(
    ("name", "channels", "options"),
    [
        ("edges", 1, {}),
        ("lineart", 1, {"dark_lines": True}),
        ("segmentation", 5, {"classes": 5}),
        ("depth", 1, {}),
        ("pose", 4, {"keypoints": 4}),
    ],
)
def test_rewards_with_networks_keep_the_contract(name, channels, options):
    images = torch.rand(3, 3, 16, 12)
    models = [network(channels, seed) for seed in range(2)]
    control = make_extractor(name, model=models[0], **options).control(images)
    for model in (models[0], models):
        reward = make_reward(f"control_{name}", model=model, **options)
        assert isinstance(reward, ControlReward)
        assert len(reward.members) == (1 if model is models[0] else 2)
        check_reward(reward, shown(images, control.flip(0)))


def test_an_ensemble_scores_the_mean_and_knows_its_std(images):
    control = torch.rand(4, 3, 64, 64)
    reward = ControlReward([Channel(0), Channel(1), Channel(1)])
    scores = evaluate(reward, shown(images, control))
    losses = torch.stack(
        [(images[:, k] - control.mean(1)).square().mean((1, 2)) for k in (0, 1, 1)]
    )
    torch.testing.assert_close(scores.value, -losses.mean(0))
    torch.testing.assert_close(scores.std, losses.std(0))
    assert list(scores.parts) == ["channel 0", "channel 1", "channel 1 2"]
    torch.testing.assert_close(scores.parts["channel 1"], -losses[1])
    check_reward(reward, shown(images, control))
    same = evaluate(ControlReward([Channel(), Channel()]), shown(images, control))
    assert isinstance(same, Scores) and torch.equal(same.std, torch.zeros(4))
    assert evaluate(ControlReward(Channel()), shown(images, control)).std is None
    by_name = make_reward({"control": {"extractor": ["luma", {"luma": 4}]}})
    assert [member.cells for member in by_name.members] == [8, 4]


def test_pixels_without_a_label_do_not_count():
    palette = [(0, 0, 0), (255, 255, 255)]
    reward = make_reward("control_segmentation", palette=palette, temperature=1)
    images = torch.rand(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    control = torch.full((2, 3, 4, 4), 0.5)
    control[0, :, 0] = 1  # one row of the first; nothing of the second
    value = evaluate(reward, shown(images, control)).value
    white, black = (images - 1).square().sum(1), images.square().sum(1)
    expected = (torch.log(torch.exp(-white) + torch.exp(-black)) + white)[0, 0].mean()
    torch.testing.assert_close(value, torch.stack([-expected, torch.tensor(0.0)]))
    maps = torch.ones(2, 4, 4)
    target = reward.target(shown(images, control))
    assert reward.mean(maps, target).tolist() == [1, 0]
    assert ControlReward(Channel()).mean(maps, torch.zeros(2, 1, 4, 4)).tolist() == [1, 1]


def test_what_the_finetuning_reads_is_what_the_reward_scores(images):
    """By its parts, as Ctrl-U calls it."""
    for name in ("segmentation", "edges"):
        reward = make_reward(f"control_{name}")
        control = make_extractor(name).control(images.flip(0))
        samples = shown(images, control)
        target = reward.target(samples)
        (loss,) = reward.loss_maps(reward.read(samples.data), target)
        assert torch.equal(*reward.read(samples.data), reward.extract(samples.data))
        assert loss.shape == (4, 64, 64) and (loss >= 0).all()
        torch.testing.assert_close(evaluate(reward, samples).value, -reward.mean(loss, target))
    first, second = torch.randn(2, 5, 3, 3), torch.randn(2, 5, 3, 3)
    reward = make_reward("control_segmentation", model=network(5), classes=5)
    log_q, log_p = second.log_softmax(1), first.log_softmax(1)
    truth = F.kl_div(log_p, log_q, log_target=True, reduction="none").sum(1)
    torch.testing.assert_close(reward.divergence(second, first), truth)


# --------------------------------------------------------------------------------------------
# Opinions
# --------------------------------------------------------------------------------------------


def test_each_member_compares_in_its_own_way(images):
    control = torch.rand(4, 3, 64, 64)
    reward = make_reward({"control": {"extractor": ["luma", {"luma": {"distance": "l1"}}]}})
    scores = evaluate(reward, shown(images, control))
    alone = [evaluate(make_reward("control_luma", distance=d), shown(images, control)).value
             for d in ("mse", "l1")]  # fmt: skip
    assert (alone[0] - alone[1]).abs().min() > 0.01
    for found, value in zip(scores.parts.values(), alone, strict=True):
        torch.testing.assert_close(found, value)


def test_opinions_of_members_are_theirs(images):
    reward = ControlReward([Channel(0), Channel(2)])
    red, blue = reward.opinions(images, "members")
    assert torch.equal(red, images[:, :1]) and torch.equal(blue, images[:, 2:])
    assert torch.equal(reward.extract(images), red)


def test_augmented_opinions_of_an_equivariant_reader_agree(images):
    """Of one pixel each, and blind to brightness: nothing changes but the pixels that are lost."""

    class Hue(Channel):
        def __call__(self, images):
            red = images[:, :1] + 1e-3
            return red / (red + images[:, 1:2] + 1e-3)

    reward = ControlReward(Hue())
    x = 0.9 * images  # so that brighter ones are not cut off
    plain, *others = reward.opinions(x, "tta")
    assert len(others) == 4
    for other in others:
        torch.testing.assert_close(other, plain, atol=2e-3, rtol=0)


def test_augmented_opinions_of_a_reader_that_is_not_equivariant_differ():
    ramp = torch.linspace(0, 1, 6).expand(1, 1, 5, 6)

    class Place(Channel):
        def __call__(self, images):
            return images[:, :1] + ramp  # adds where the pixel is seen

    images = torch.rand(1, 3, 5, 6)
    plain, flip, darker, brighter, shift = ControlReward(Place()).opinions(images, "tta")
    red = images[:, :1]
    torch.testing.assert_close(plain, red + ramp)
    torch.testing.assert_close(flip, red + ramp.flip(-1))
    torch.testing.assert_close(darker, 0.95 * red + ramp)
    torch.testing.assert_close(brighter, (1.05 * red).clamp(max=1) + ramp)
    torch.testing.assert_close(shift[..., :-1, :-1], (red + ramp + 0.2)[..., :-1, :-1])
    torch.testing.assert_close(shift[..., -1, :], plain[..., -1, :])
    torch.testing.assert_close(shift[..., :, -1], plain[..., :, -1])


@pytest.mark.parametrize("name", ["edges", "canny", "lineart", "luma", "colour"])
def test_filters_are_sure_of_what_they_read(name, images):
    """They are the condition: where they were unsure, it would not be about an error of theirs."""
    reward = make_reward(f"control_{name}")
    plain, *others = reward.opinions(images, "tta")
    assert others
    for other in others:
        # ties and the picture's edge aside
        differs = reward.divergence(other, plain)[..., 4:-4, 4:-4] > 1e-3
        assert differs.float().mean() < 0.01


def test_dropped_opinions_have_the_same_masks_for_every_picture_and_call():
    model = network()
    reward = make_reward("control_edges", model=model, num_passes=3)
    images = torch.rand(3, 3, 8, 8)
    state = torch.get_rng_state()
    first = reward.opinions(images, "dropout")
    assert torch.equal(torch.get_rng_state(), state) and not model.training
    assert len(first) == 4
    assert torch.equal(first[0], model(images))
    for again in (reward.opinions(images, "dropout"), reward.opinions(images.flip(0), "dropout")):
        turned = torch.equal(again[0], first[0])
        for a, b in zip(again, first, strict=True):
            torch.testing.assert_close(a if turned else a.flip(0), b)
    for a in first:
        for b in first:
            assert a is b or (a - b).abs().mean() > 1e-3
    # each is the network with half of the hidden numbers gone and the others doubled
    generator = torch.Generator().manual_seed(0)
    for found in first[1:]:
        hidden = model[1](model[0](images))
        keep = torch.rand(1, 8, 8, 8, generator=generator) >= 0.5
        torch.testing.assert_close(found, model[4](model[3](hidden * keep * 2)))
    other = make_reward("control_edges", model=model, num_passes=3, seed=1)
    assert not torch.allclose(other.opinions(images, "dropout")[1], first[1])


def test_opinions_carry_a_gradient():
    reward = make_reward("control_edges", model=[network(), network(seed=1)])
    images = torch.rand(1, 3, 8, 8, requires_grad=True)
    for source in ("members", "tta", "dropout"):
        for opinion in reward.opinions(images, source):
            (gradient,) = torch.autograd.grad(opinion.sum(), images, retain_graph=True)
            assert gradient.abs().sum() > 0


def test_opinions_that_cannot_be_had_are_named(images):
    reward = make_reward("control_luma")
    with pytest.raises(ValueError, match="one of members, tta, dropout, but 'two_timesteps' came"):
        reward.opinions(images, "two_timesteps")
    with pytest.raises(ValueError, match="'control_luma' has one extractor, .* list of them"):
        reward.opinions(images, "members")
    with pytest.raises(ValueError, match="extractor 'luma' has no dropout layer"):
        reward.opinions(images, "dropout")
    once = make_reward("control_edges", model=network(), num_passes=1)
    with pytest.raises(ValueError, match="num_passes must be 2 or more"):
        once.opinions(images, "dropout")


# --------------------------------------------------------------------------------------------
# What is refused
# --------------------------------------------------------------------------------------------


def test_control_images_that_do_not_fit_are_named(images):
    reward = make_reward("control_edges")
    control = torch.rand(4, 3, 64, 64)
    for context, match in [
        ({}, r"'control_edges' compares .* there is nothing"),
        ({"depth": control}, "there is depth"),
        ({"control": control[..., :32]}, "the pictures are 64x64 and the control images 64x32"),
        ({"control": control[:, :2]}, r"1 or 3 channels, \(4, 3, h, w\), but \(4, 2, 64, 64\)"),
        ({"control": control[:, 0]}, r"but \(4, 64, 64\) came"),
        ({"control": ["a"] * 4}, "but list came"),
        ({"control": 255 * control}, r"in \[0, 1\], but torch.float32 from .* divide uint8"),
        ({"control": 2 * control - 1}, r"in \[0, 1\], but torch.float32 from -"),
        ({"control": (255 * control).byte()}, "torch.uint8"),
        ({"control": torch.full_like(control, torch.nan)}, "from nan to nan"),
    ]:
        samples = Samples(images, "image", context=context)
        with pytest.raises(ValueError, match=match):
            reward.target(samples)
    grey = read_control(shown(images, control[:, :1].double().requires_grad_()), "a test")
    assert grey.shape == images.shape and grey.dtype == images.dtype and not grey.requires_grad


def test_members_of_different_kinds_are_refused():
    with pytest.raises(ValueError, match="one extractor or more, but none came"):
        ControlReward([])
    for specs in (["edges", "canny"], ["luma", "colour"]):
        with pytest.raises(ValueError, match=f"of one kind, but '{specs[0]}' and '{specs[1]}'"):
            ControlReward(specs)
    white = {"name": "segmentation", "palette": [(255, 255, 255), (0, 0, 0)]}
    with pytest.raises(ValueError, match="palette"):
        ControlReward(["segmentation", white])


def test_a_wrong_option_is_named():
    with pytest.raises(ValueError, match=r"'edges' has no option 'sigm' \(did you mean 'sigma'"):
        make_reward("control_edges", sigm=2)
    with pytest.raises(ValueError, match="needs the option model"):
        make_reward("control_depth")
    with pytest.raises(ValueError, match="needs the option extractor"):
        make_reward("control")


def test_a_network_that_cuts_the_gradient_is_named():
    """As a cast to uint8 does, which the authors' HED has."""

    def hed(images):
        return (255 * images[:, :1]).to(torch.uint8) / 255

    images = torch.rand(2, 3, 8, 8)
    samples = shown(images, images[:, :1])
    reward = make_reward("control_edges", model=hed)
    assert evaluate(reward, samples).value.max() > -1e-4  # nobody asks for a gradient
    with pytest.raises(ValueError, match="'edges' declares a gradient, .* casts to integers"):
        evaluate(reward, dataclasses.replace(samples, data=images.requires_grad_()))


def test_hard_edges_make_a_reward_without_gradient(images):
    reward = make_reward("control_canny", hard=True)
    assert reward.info.differentiable is False
    control = make_extractor("canny").control(images)
    assert torch.equal(evaluate(reward, shown(images, control)).value, torch.zeros(4))
    check_reward(reward, shown(images, control.flip(0)))


def test_networks_are_named_and_moved():
    a, b = network(), network(seed=1)
    reward = make_reward("control_edges", model=[a, b])
    assert reward.info.weights == "a given Sequential + a given Sequential"
    assert reward.to("cpu") is reward
    assert make_reward("control_luma").info.weights is None
