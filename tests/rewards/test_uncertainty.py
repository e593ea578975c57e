"""Opinions from four sources against independent computations, and what uncertainty must not do."""

import dataclasses
import functools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import yaml
from torch import nn

from diffreward.rewards import RewardInfo, Scores, as_reward, base, evaluate, make_reward
from diffreward.rewards.testing import check_reward
from diffreward.rewards.uncertainty import AUGMENTATIONS
from diffreward.samples import Samples


@pytest.fixture
def images():
    data = torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    return Samples(data, "image", ["a cat", "a dog", "a red heart", "a blue ring"])


def mean_of(channel):
    info = RewardInfo(f"channel {channel}", "image", True, range=(0, 1))
    return as_reward(lambda s: s.data[:, channel].mean(dim=(1, 2)), info)


RED, GREEN, BLUE = (mean_of(channel) for channel in range(3))


def close(value, expected, atol=1e-6, rtol=1e-5):
    expected = torch.as_tensor(np.asarray(expected), dtype=torch.float64)
    torch.testing.assert_close(value.double(), expected, atol=atol, rtol=rtol)


def softmin(r, beta):
    return -beta * np.log(np.exp(-np.asarray(r) / beta).mean(axis=0))


# --------------------------------------------------------------------------------------------
# Members
# --------------------------------------------------------------------------------------------


def test_members_are_aggregated_and_their_spread_is_the_std(images):
    r = images.data.double().numpy().mean(axis=(2, 3)).T  # (3, b)
    std = r.std(axis=0, ddof=1)
    for aggregate, options, expected in [
        ("softmin", {"beta": 0.2}, softmin(r, 0.2)),
        ("softmin", {}, softmin(r, 0.1)),
        ("lcb", {"kappa": 2}, r.mean(0) - 2 * std),
        ("mean", {}, r.mean(0)),
        ("min", {}, r.min(0)),
        ("mean_minus_variance", {"lam": 3.0}, r.mean(0) - 3 * std**2),
    ]:
        spec = {"reward": [RED, GREEN, BLUE], "aggregate": aggregate, **options}
        reward = make_reward({"uncertain": spec})
        scores = evaluate(reward, images)
        close(scores.value, expected)
        close(scores.std, std)
        assert list(scores.parts) == ["channel 0", "channel 1", "channel 2"]
    check_reward(make_reward({"uncertain": [RED, GREEN, BLUE]}), images)
    assert make_reward({"uncertain": [RED, BLUE]}).info.name == (
        "softmin_members(channel 0, channel 2)"
    )


def test_identical_members_are_certain_and_score_as_one(images):
    plain = evaluate(make_reward("colorfulness"), images).value
    for aggregate in ("softmin", "lcb", "mean", "min", "mean_minus_variance"):
        reward = make_reward(
            {"uncertain": {"reward": ["colorfulness"] * 3, "aggregate": aggregate}}
        )
        data = images.data.clone().requires_grad_()
        scores = evaluate(reward, Samples(data, "image"))
        assert torch.equal(scores.value.detach(), plain)
        assert torch.equal(scores.std.detach(), torch.zeros(4))
        (gradient,) = torch.autograd.grad((scores.value + scores.std).sum(), data)
        (expected,) = torch.autograd.grad(
            evaluate(make_reward("colorfulness"), Samples(data, "image")).value.sum(), data
        )
        torch.testing.assert_close(gradient, expected)


def test_the_gradient_of_the_std_is_that_of_the_formula(images):
    data = images.data.clone().requires_grad_()
    scores = evaluate(make_reward({"uncertain": [RED, BLUE]}), Samples(data, "image"))
    (gradient,) = torch.autograd.grad(scores.std.sum(), data)
    # std of two is |red - blue| / sqrt(2)
    mean = data.detach().mean(dim=(2, 3))
    sign = (mean[:, 0] - mean[:, 2]).sign() / (64 * math.sqrt(2))
    expected = torch.zeros_like(data)
    expected[:, 0], expected[:, 2] = sign[:, None, None], -sign[:, None, None]
    torch.testing.assert_close(gradient, expected)


def test_uncertainty_never_lifts_a_negative_reward(images):
    """exp(-U) would: the more the members disagree, the nearer to 0."""

    def low(spread):
        members = [as_reward(lambda s, d=d: RED(s).value - 10 + d) for d in (-spread, spread)]
        return evaluate(make_reward({"uncertain": members}), images).value

    assert (low(2.0) < low(1.0)).all() and (low(1.0) < low(0.0)).all()


def test_one_opinion_is_no_uncertainty():
    for options in (
        {"reward": [RED]},
        {"reward": RED},
        {"reward": RED, "source": "tta", "augmentations": []},
        {"reward": RED, "source": "dropout", "num_passes": 1},
    ):
        with pytest.raises(ValueError, match="2 or more|takes a list|one or more"):
            make_reward({"uncertain": options})


# --------------------------------------------------------------------------------------------
# Test-time augmentation
# --------------------------------------------------------------------------------------------


def test_augmentations_are_what_they_say():
    image = torch.rand(1, 3, 64, 96, generator=torch.Generator().manual_seed(0))
    changed = {name: augment(image) for name, augment in AUGMENTATIONS.items()}
    for name, result in changed.items():
        assert result.shape == image.shape, name
        assert result.min() >= 0 and result.max() <= 1, name
        assert not torch.equal(result, image), name
    pixels = image.numpy()
    np.testing.assert_array_equal(changed["flip"], pixels[..., ::-1])
    np.testing.assert_array_equal(changed["shift"][..., 2:, 3:], pixels[..., :-2, :-3])
    np.testing.assert_array_equal(changed["shift"][..., 2:, 0], pixels[..., :-2, 0])
    np.testing.assert_allclose(changed["brighter"], np.minimum(pixels * 1.1, 1), rtol=1e-6)
    np.testing.assert_allclose(changed["darker"], pixels * 0.9, rtol=1e-6)
    # cropping 2 and 3 pixels off each side and enlarging keeps a linear ramp linear
    ramp = torch.arange(96.0).expand(1, 3, 64, 96) / 95
    crop = AUGMENTATIONS["crop"](ramp)[0, 0, 5, 2:-2] * 95
    at = (torch.arange(96.0)[2:-2] + 0.5) * 90 / 96 - 0.5 + 3
    torch.testing.assert_close(crop, at, atol=1e-3, rtol=0)


@pytest.mark.parametrize("size", [(1, 1), (2, 3), (33, 64)])
def test_augmentations_take_any_size_and_carry_gradients(size):
    image = torch.rand(2, 3, *size, requires_grad=True)
    for name, augment in AUGMENTATIONS.items():
        changed = augment(image)
        assert changed.shape == image.shape
        (gradient,) = torch.autograd.grad(changed.sum(), image)
        assert gradient.isfinite().all() and gradient.abs().sum() > 0, name


def test_tta_asks_about_changed_images(images):
    weight = torch.rand(3, 8, 8, generator=torch.Generator().manual_seed(1))
    info = RewardInfo("masked", "image", True, range=(0, 192))
    masked = as_reward(lambda s: (s.data * weight).sum(dim=(1, 2, 3)), info)
    names = ["flip", "darker"]
    options = {"reward": masked, "source": "tta", "augmentations": names, "aggregate": "lcb"}
    reward = make_reward({"uncertain": options})
    x, w = images.data.double().numpy(), weight.double().numpy()
    r = np.stack([(v * w).sum(axis=(1, 2, 3)) for v in (x, x[..., ::-1], 0.9 * x)])
    scores = evaluate(reward, images)
    close(scores.value, r.mean(0) - r.std(0, ddof=1), rtol=1e-4)
    close(scores.std, r.std(0, ddof=1), rtol=1e-4)
    assert list(scores.parts) == ["plain", *names]
    check_reward(reward, images)
    check_reward(make_reward({"uncertain": {"reward": masked, "source": "tta"}}), images)


def test_a_reward_that_augmentations_leave_alone_is_certain(images):
    options = {"reward": RED, "source": "tta", "augmentations": ["flip"]}
    scores = evaluate(make_reward({"uncertain": options}), images)
    assert torch.equal(scores.parts["plain"], evaluate(RED, images).value)
    close(scores.std, np.zeros(4), atol=1e-7)


@pytest.mark.parametrize("names", [["flip"], ["flip", "crop", "darker"]])
def test_the_range_of_a_lower_bound_depends_on_how_many_opinions_there_are(names):
    unit = as_reward(lambda s: s.data.mean(dim=(1, 2, 3)), RewardInfo("unit", range=(0, 1)))
    reward = make_reward(
        {"uncertain": {"reward": unit, "source": "tta", "augmentations": names, "aggregate": "lcb"}}
    )
    k = 1 + len(names)  # half of them 0, half 1: mean 1/2, unbiased std sqrt(k / (k - 1)) / 2
    assert reward.info.range == pytest.approx((-((k / (k - 1)) ** 0.5) / 2, 1))


def test_tta_is_for_images():
    words = as_reward(lambda s: torch.zeros(len(s)), RewardInfo("words", "text"))
    with pytest.raises(ValueError, match="tta changes images, but 'words' scores text"):
        make_reward({"uncertain": {"reward": words, "source": "tta"}})
    anything = as_reward(lambda s: torch.zeros(len(s)))
    reward = make_reward({"uncertain": {"reward": anything, "source": "tta"}})
    assert reward.info.modality == "image"
    for names in (["flop"], ["flip", "flip"]):
        with pytest.raises(ValueError, match="one or more different of flip, shift"):
            options = {"reward": RED, "source": "tta", "augmentations": names}
            make_reward({"uncertain": options})


# --------------------------------------------------------------------------------------------
# Dropout
# --------------------------------------------------------------------------------------------


def network(p=0.5, seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Conv2d(3, 8, 3), nn.Dropout2d(p / 2), nn.Flatten(), nn.Linear(288, 16), nn.GELU(),
            nn.Dropout(p), nn.Linear(16, 1),
        ).eval()  # fmt: skip


class Judge:
    """A reward that scores a few samples at a time, as those with large networks do."""

    def __init__(self, p=0.5, chunk_size=3):
        self.info = RewardInfo("judge", "image", True)
        self.network = network(p).requires_grad_(False)
        self.chunk_size = chunk_size
        self.memory = {}

    def __call__(self, samples):
        chunks = samples.data.split(self.chunk_size)
        value = torch.cat([self.network(chunk)[:, 0] for chunk in chunks])
        if samples.prompts is None:
            return Scores(value)
        # remembers what its own network thinks of a prompt, as text towers do
        for prompt in samples.prompts:
            if prompt not in self.memory:
                self.memory[prompt] = self.network(torch.full((1, 3, 8, 8), len(prompt) / 20))
        return Scores(value + torch.stack([self.memory[p][0, 0] for p in samples.prompts]))


def test_dropout_passes_are_the_networks_with_those_masks(images):
    """Against the network written out, with masks drawn as documented: on the CPU, in order."""
    judge = Judge()
    options = {"reward": judge, "source": "dropout", "num_passes": 3, "seed": 7}
    samples = Samples(images.data, "image")
    scores = evaluate(make_reward({"uncertain": options}), samples)
    conv, drop1, _, linear, _, drop2, last = judge.network
    for i in range(4):
        generator = torch.Generator().manual_seed(7)
        x = conv(images.data[[i] * 3])
        x = x * (torch.rand(3, 8, 1, 1, generator=generator) >= drop1.p) / (1 - drop1.p)
        x = F.gelu(linear(x.flatten(1)))
        x = x * (torch.rand(3, 16, generator=generator) >= drop2.p) / (1 - drop2.p)
        passes = last(x)[:, 0].detach().double().numpy()
        close(torch.stack([scores.parts[f"pass {k + 1}"][i] for k in range(3)]), passes)
        close(scores.std[i], passes.std(ddof=1))
        close(scores.value[i], softmin(passes, 0.1))
    torch.testing.assert_close(scores.parts["plain"], judge(samples).value)


def test_dropout_keeps_the_contract_however_the_reward_splits_its_batches(images):
    # check_reward: no sample's masks depend on its batch mates, and no global state is touched
    for chunk_size in (1, 3, 64):
        judge = Judge(chunk_size=chunk_size)
        options = {"reward": judge, "source": "dropout", "num_passes": 3}
        check_reward(make_reward({"uncertain": options}), Samples(images.data, "image"))
        assert not any(module.training for module in judge.network.modules())


def test_what_a_reward_remembers_of_a_prompt_has_no_dropout(images):
    fresh, judge = Judge(), Judge()
    options = {"reward": judge, "source": "dropout", "num_passes": 4}
    evaluate(make_reward({"uncertain": options}), images)
    torch.testing.assert_close(evaluate(judge, images).value, evaluate(fresh, images).value)
    assert judge.memory.keys() == fresh.memory.keys()


def test_dropout_ends_with_an_error(images):
    judge = Judge()
    reward = make_reward({"uncertain": {"reward": judge, "source": "dropout", "num_passes": 2}})
    before = evaluate(judge, images).value
    calls = []

    def fail(module, inputs, output):
        calls.append(len(output))
        if len(output) == 2:  # the second call: two copies with dropout
            raise ValueError("out of luck")

    handle = judge.network.register_forward_hook(fail)
    with pytest.raises(ValueError, match="sample 0, as a batch of 2 by itself: out of luck"):
        evaluate(reward, Samples(images.data, "image"))
    handle.remove()
    assert calls == [1, 2]
    assert torch.equal(evaluate(judge, images).value, before)
    assert not any(module._forward_hooks for module in judge.network.modules())


def test_the_right_sample_is_named_although_each_is_scored_alone(images):
    judge = Judge()
    third = images.data[2].clone()

    def reward(samples):
        same = (samples.data == third).flatten(1).all(dim=1)
        return judge.network(samples.data)[:, 0].masked_fill(same, math.nan)

    options = {"reward": reward, "source": "dropout", "num_passes": 2}
    with pytest.raises(ValueError, match="^sample 2, .*'reward' gave nan"):
        evaluate(make_reward({"uncertain": options}), images)


@pytest.mark.parametrize("hide", ["attribute", "closure", "partial", "list", "combined", "method"])
def test_networks_are_found_wherever_a_reward_keeps_them(images, hide):
    judge = Judge()

    def score(network, samples):
        return network(samples.data)[:, 0]

    rewards = {
        "attribute": judge,
        "closure": lambda samples: judge.network(samples.data)[:, 0],
        "partial": functools.partial(score, judge.network),
        "list": functools.partial(lambda layers, s: layers[0](s.data)[:, 0], [judge.network]),
        "combined": {"weighted_sum": [RED, {"clip_range": {"reward": judge, "low": -99}}]},
        "method": judge.__call__,
    }
    options = {"reward": rewards[hide], "source": "dropout", "num_passes": 3}
    scores = evaluate(make_reward({"uncertain": options}), Samples(images.data, "image"))
    assert (scores.std > 1e-3).all()


def test_no_dropout_to_turn_on_is_an_error():
    for reward in (Judge(p=0.0), RED, "colorfulness"):
        with pytest.raises(ValueError, match="no dropout layer with p above 0"):
            make_reward({"uncertain": {"reward": reward, "source": "dropout"}})


# --------------------------------------------------------------------------------------------
# Two noise levels
# --------------------------------------------------------------------------------------------


def test_two_timesteps_asks_about_both_predictions(images):
    second = images.data.flip(0) ** 2
    samples = dataclasses.replace(images, context={"second_prediction": second})
    options = {"reward": RED, "source": "two_timesteps", "aggregate": "lcb", "kappa": 0.5}
    reward = make_reward({"uncertain": options})
    assert reward.info.needs_context == ("second_prediction",)
    r = np.stack([v.double().numpy()[:, 0].mean(axis=(1, 2)) for v in (images.data, second)])
    scores = evaluate(reward, samples)
    close(scores.value, r.mean(0) - 0.5 * np.abs(r[0] - r[1]) / math.sqrt(2))
    close(scores.std, np.abs(r[0] - r[1]) / math.sqrt(2))
    assert list(scores.parts) == ["first", "second"]
    check_reward(reward, samples)

    same = dataclasses.replace(images, context={"second_prediction": images.data})
    plain = evaluate(RED, images).value
    assert torch.equal(evaluate(reward, same).value, plain)
    assert torch.equal(evaluate(reward, same).std, torch.zeros(4))


def test_two_timesteps_refuses_what_is_no_second_prediction(images):
    reward = make_reward({"uncertain": {"reward": RED, "source": "two_timesteps"}})
    with pytest.raises(ValueError, match="needs second_prediction in Samples.context"):
        evaluate(reward, images)
    smaller = dataclasses.replace(images, context={"second_prediction": images.data[..., :4]})
    with pytest.raises(ValueError, match=r"shape \(4, 3, 8, 8\), but \(4, 3, 8, 4\) came"):
        evaluate(reward, smaller)
    broken = images.data.clone()
    broken[3] = math.nan
    diverged = dataclasses.replace(images, context={"second_prediction": broken})
    with pytest.raises(ValueError, match="sample 3 .*has NaN"):
        evaluate(reward, diverged)


# --------------------------------------------------------------------------------------------
# As a spec
# --------------------------------------------------------------------------------------------

YAML = """
weighted_sum:
  - uncertain: [colorfulness, {standardize: {reward: colorfulness, mean: 1, std: 2}}]
    weight: 0.01
  - uncertain:
      reward: {target_color: orange}
      source: tta
      aggregate: lcb
      kappa: 2
"""


def test_uncertain_rewards_nest_in_yaml(images):
    reward = make_reward(yaml.safe_load(YAML))
    assert reward.info.differentiable and reward.info.modality == "image"
    scores = evaluate(reward, images)
    colorful = evaluate(make_reward("colorfulness"), images).value.double().numpy()
    orange = make_reward("target_color", color="orange")
    x = images.data
    changed = [x, *(augment(x) for augment in AUGMENTATIONS.values())]
    r = np.stack([evaluate(orange, Samples(v, "image")).value.double().numpy() for v in changed])
    members = np.stack([colorful, (colorful - 1) / 2])
    first = softmin(members - members.min(0), 0.1) + members.min(0)
    close(scores.value, 0.01 * first + r.mean(0) - 2 * r.std(0, ddof=1), rtol=1e-4)
    close(scores.std, 0.01 * members.std(0, ddof=1) + r.std(0, ddof=1), rtol=1e-4)
    check_reward(reward, images)


def test_uncertain_says_what_is_wrong():
    with pytest.raises(ValueError, match="source is one of members, tta, dropout, two_timesteps"):
        make_reward({"uncertain": {"reward": RED, "source": "time"}})
    with pytest.raises(ValueError, match="aggregate is one of"):
        make_reward({"uncertain": {"reward": [RED, BLUE], "aggregate": "median"}})
    with pytest.raises(ValueError, match="beta must be above zero"):
        make_reward({"uncertain": {"reward": [RED, BLUE], "beta": 0}})
    info = base.find_reward("uncertain").info
    assert info.licence and info.source and info.description and not info.needs_download
