"""Ctrl-U against its formula, written anew, on a network of one tensor."""

import itertools
import math

import pytest
import torch
from torch import nn

from diffreward.algorithms import ctrl_u, make_algorithm
from diffreward.algorithms.base import uniform
from diffreward.algorithms.ctrl_u import CtrlU
from diffreward.policy import Condition, randn, sample_generators
from diffreward.rewards import as_reward, evaluate
from diffreward.rewards.base import RewardInfo
from diffreward.rewards.control import ControlReward
from diffreward.rewards.extractors import Extractor
from diffreward.samples import Samples

SIDE = 4
CLOSE = {"rtol": 1e-6, "atol": 1e-9}


# -- toys ----------------------------------------------------------------------------------------


def predicted(theta, x0, u, eps):
    u = u.double().view(-1, 1, 1, 1)
    return x0 + torch.sin(3 * u) * eps * theta.view(1, 3, 1, 1) + u**2 * theta.sum()


def erred(theta, x0, u, eps):
    return ((theta.view(1, 3, 1, 1) - u.double().view(-1, 1, 1, 1)) * eps).square().mean((1, 2, 3))


class Network(nn.Module):
    def __init__(self, theta):
        super().__init__()
        self.theta = nn.Parameter(torch.tensor(theta, dtype=torch.float64))


class Toy:
    """float64 pictures are their own latents."""

    device, num_steps = torch.device("cpu"), 1
    encode = initial = step_law = denoising_loss = reference = print

    def __init__(self, theta=(0.5, -0.4, 0.3)):
        self.denoiser = Network(theta)
        self.calls, self.decoded = [], []  # (times, graph?), (rows, graph?)

    def denoise(self, x0, u, eps, condition):
        assert len(x0) == len(u) == len(condition) and x0.shape == eps.shape
        self.calls.append((u.clone(), torch.is_grad_enabled()))
        theta = self.denoiser.theta
        return predicted(theta, x0, u, eps), erred(theta, x0, u, eps)

    def decode(self, x0, condition):
        self.decoded.append((len(x0), torch.is_grad_enabled()))
        context = {"control": condition.tensors["control"]}
        return Samples(x0, "image", list(condition.prompts), context)


class Squashed(Extractor):
    """tanh of a multiple of the pictures."""

    name, channels, augmentations = "squashed", 3, ("darker",)

    def __init__(self, slope=1.0):
        super().__init__()
        self.slope = slope

    def __call__(self, images):
        return torch.tanh(self.slope * images)


class Plain(Extractor):
    """The pictures themselves, plus something."""

    name, channels = "plain", 3

    def __init__(self, plus=0.0):
        super().__init__()
        self.plus = plus

    def __call__(self, images):
        return images + self.plus


SLOPES = (1.0, 1.6, 0.5)


class Watched(ControlReward):
    """The first extractor is the reward; the others only say where they disagree."""

    def loss_maps(self, predictions, target):
        return super().loss_maps(predictions, target)[:1]


def reward_of(source=None):
    return ControlReward([Squashed(s) for s in (SLOPES if source == "members" else SLOPES[:1])])


def data(n=6, seed=0):
    g = torch.Generator().manual_seed(seed)
    x0, control = (torch.rand(n, 3, SIDE, SIDE, generator=g, dtype=torch.float64) for _ in "ab")
    return x0, Condition([f"prompt {j}" for j in range(n)], {"control": control})


def generators(n=6, first=0):
    return sample_generators(65, n, 1, first_prompt=first)


def drawn(n=6):
    """Times and noise that the generators give."""
    g = generators(n)
    u = uniform(n, g).float()
    return u, randn((n, 3, SIDE, SIDE), g, dtype=torch.float64)


def run(algorithm, policy=None, reward=None, x0=None, condition=None, own=None):
    policy = policy or Toy()
    if x0 is None:
        x0, condition = data()
    reward = reward or reward_of(algorithm.uncertainty)
    own = generators(len(x0)) if own is None else own
    loss, samples, scores = algorithm.loss(
        policy, condition, own, lambda s: evaluate(reward, s), x0=x0, reward=reward
    )
    return loss, samples, scores, policy


def gradient(loss, policy):
    return torch.autograd.grad(loss.sum(), policy.denoiser.theta)[0]


# -- the formula ---------------------------------------------------------------------------------


def formula(theta, held, options):
    """Losses of all samples; `held` are the weights where no gradient flows."""
    o = {
        "weight": 0.5, "max_time": 0.4, "uncertainty": "two_timesteps", "interval": 0.001,
        "tau": 1.0, "weigh": True, "penalty": 0.1, "penalty_gradient": "primary",
        "both_passes": False, "faithful": False, **options,
    }  # fmt: skip
    x0, condition = data()
    control, (u, eps) = condition.tensors["control"], drawn()
    times = [u, u + o["interval"]]

    def picture(k, weights):
        return predicted(weights, x0, times[k], eps)

    def spread(k, mine, others):
        """U of prediction k, by weights for it and for what it is compared with."""
        own = torch.tanh(picture(k, mine))
        if o["uncertainty"] is None:
            return torch.zeros_like(own).mean(1)
        if o["uncertainty"] == "two_timesteps":
            found = [torch.tanh(picture(1 - k, others))]
        elif o["uncertainty"] == "members":
            found = [torch.tanh(slope * picture(k, others)) for slope in SLOPES[1:]]
        else:
            found = [torch.tanh(0.95 * picture(k, others))]
        return sum((each - own).abs().mean(1) for each in found) / len(found)

    reached = "both" if o["faithful"] else o["penalty_gradient"]
    mine = held if reached == "none" else theta
    whole = ("both",) if o["uncertainty"] == "two_timesteps" else ("primary", "both")
    others = theta if reached in whole else held
    in_weights = theta if o["faithful"] else held
    total, count = 0, 2 if o["both_passes"] else 1
    for k in range(count):
        slopes = SLOPES if o["uncertainty"] == "members" else SLOPES[:1]
        off = [(torch.tanh(s * picture(k, theta)) - control).square().mean(1) for s in slopes]
        off = sum(off) / len(off)
        w = torch.ones_like(off)
        if o["weigh"]:
            w = torch.exp(-spread(k, in_weights, in_weights) / o["tau"])
        extra = o["weight"] * (w * off).mean((1, 2))
        extra = extra + o["penalty"] * spread(k, mine, others).mean((1, 2))
        total = total + erred(theta, x0, times[k], eps) + (u <= o["max_time"]) * extra
    return total / count


OPTIONS = [
    {},
    {"uncertainty": None},
    {"uncertainty": "members"},
    {"uncertainty": "tta"},
    {"weight": 2.0, "penalty": 0.7},
    {"weight": 0.0},
    {"penalty": 0.0},
    {"weigh": False, "penalty": 0.3},
    {"tau": 0.05, "interval": 0.1},
    {"tau": 0.05, "interval": 0.1, "faithful": True},
    {"tau": 0.05, "uncertainty": "members", "faithful": True},
    {"tau": 0.1, "uncertainty": "tta", "penalty_gradient": "both"},
    {"interval": 0.2, "both_passes": True},
    {"interval": 0.2, "both_passes": True, "faithful": True, "tau": 0.2},
    {"interval": 0.2, "both_passes": True, "penalty_gradient": "both"},
    {"both_passes": True, "uncertainty": "members", "tau": 0.1},
    {"both_passes": True, "uncertainty": None, "interval": 0.2},
    {"max_time": 1.0},
    {"max_time": 0.7, "penalty_gradient": "none", "interval": 0.05},
    {"penalty_gradient": "both", "interval": 0.05, "penalty": 1.0},
    {"penalty_gradient": "both", "uncertainty": "members", "penalty": 1.0},
    {"penalty_gradient": "none", "uncertainty": "members"},
    {"penalty_gradient": "none", "faithful": True, "interval": 0.05},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_losses_and_gradients_are_the_formulas(options):
    u, _ = drawn()
    assert 2 <= (u <= 0.4).sum() <= 4 and (u + 0.2 < 1).all()
    loss, _, _, policy = run(CtrlU(**options))
    theta = policy.denoiser.theta
    expected = formula(theta, theta.detach(), options)
    torch.testing.assert_close(loss, expected, **CLOSE)
    torch.testing.assert_close(gradient(loss, policy), gradient(expected, policy), **CLOSE)


@pytest.mark.parametrize("faithful", [False, True])
def test_gradients_are_finite_differences_with_and_without_the_weights(faithful):
    options = {"tau": 0.05, "interval": 0.1, "faithful": faithful, "penalty_gradient": "both"}
    loss, _, _, policy = run(CtrlU(**options))
    found, theta = gradient(loss, policy), policy.denoiser.theta.detach()
    for i in range(3):
        step = torch.zeros(3, dtype=torch.float64)
        step[i] = 1e-6
        high, low = (
            formula(theta + s, theta + s if faithful else theta, options).sum()
            for s in (step, -step)
        )
        torch.testing.assert_close(found[i], (high - low) / 2e-6, rtol=1e-4, atol=1e-6)


def test_whom_the_gradient_of_the_penalty_reaches_matters():
    """The tests above could not tell otherwise."""

    def of(**options):
        loss, _, _, policy = run(CtrlU(interval=0.1, tau=0.05, penalty=1.0, **options))
        return gradient(loss, policy)

    found = [of(penalty_gradient=each) for each in ("none", "primary", "both")]
    found += [of(faithful=True), of(both_passes=True), of(weigh=False)]
    for a, b in itertools.combinations(found, 2):
        assert (a - b).abs().max() > 1e-3 * a.abs().max()


@pytest.mark.parametrize("source", [None, "two_timesteps", "members", "tta"])
def test_what_is_rewarded_is_the_reward_of_all_members(source):
    reward, (x0, _) = reward_of("members"), data()
    algorithm = CtrlU(uncertainty=source, interval=0.1, max_time=1.0)
    _, samples, scores, policy = run(algorithm, None, reward)
    expected = evaluate(reward, samples)
    torch.testing.assert_close(scores.value, expected.value.float())
    assert not torch.allclose(expected.value, expected.parts["squashed"])
    plain, *_ = run(CtrlU(uncertainty=None, max_time=1.0), None, reward)
    theta = policy.denoiser.theta.detach()
    diffusion = erred(theta, x0, drawn()[0], drawn()[1])
    torch.testing.assert_close(plain.detach(), diffusion - 0.5 * expected.value, **CLOSE)


def test_two_predictions_are_compared_by_all_members():
    alone = [ControlReward(Squashed(slope)) for slope in SLOPES]
    algorithm = CtrlU(interval=0.3, max_time=1.0)
    each = [run(algorithm, None, reward)[2].parts["uncertainty"] for reward in alone]
    together = run(algorithm, None, reward_of("members"))[2].parts["uncertainty"]
    torch.testing.assert_close(together, sum(each) / 3)
    assert not torch.allclose(each[0], each[1])


class Mixing(Extractor):
    """A convolution in float32, which autocast would compute in bfloat16."""

    name, channels = "mixing", 3

    def __init__(self, seed):
        super().__init__()
        g = torch.Generator().manual_seed(seed)
        self.weight = torch.randn(3, 3, 1, 1, generator=g)

    def __call__(self, images):
        return nn.functional.conv2d(images.float(), self.weight)


@pytest.mark.parametrize("source", ["two_timesteps", "members"])
def test_readings_are_in_full_precision_under_autocast(source):
    reward = ControlReward([Mixing(0), Mixing(1)][: 1 + (source == "members")])
    algorithm = CtrlU(uncertainty=source, interval=0.1, tau=0.1, max_time=1.0)
    loss, _, scores, policy = run(algorithm, None, reward)
    images = data()[0]
    with torch.autocast("cpu", torch.bfloat16):
        assert Mixing(0)(images).dtype == torch.bfloat16
        half, _, theirs, other = run(algorithm, None, reward)
    assert torch.equal(loss, half) and torch.equal(gradient(loss, policy), gradient(half, other))
    assert torch.equal(scores.parts["uncertainty"], theirs.parts["uncertainty"])


class Later(Toy):
    """The first prediction is x0; the second is beside it by theta, which so is U."""

    def denoise(self, x0, u, eps, condition):
        self.calls.append((u, torch.is_grad_enabled()))
        off = self.denoiser.theta[0] * (len(self.calls) - 1)
        return x0 + off, torch.zeros(len(x0), dtype=torch.float64) + 0 * self.denoiser.theta.sum()


@pytest.mark.parametrize("spread", [0.2, 1.5])
def test_published_gradients_raise_a_small_uncertainty_and_ours_do_not(spread):
    """d/dU (l exp(-U) + lambda U) = lambda - l exp(-U), below 0 where U < ln(l / lambda)."""
    x0, _ = data(1)
    condition = Condition(["x"], {"control": torch.ones_like(x0)})
    x0 = torch.zeros_like(x0)  # l is 1 everywhere
    lam, reward = 0.4, ControlReward(Plain())
    assert (spread < math.log(1 / lam)) == (spread == 0.2)

    def slope(**options):
        policy = Later((spread, 0.0, 0.0))
        algorithm = CtrlU(weight=1.0, penalty=lam, max_time=1.0, **options)
        loss, *_ = run(algorithm, policy, reward, x0, condition)
        return gradient(loss, policy)[0].item()

    faithful = lam - math.exp(-spread)
    assert slope(faithful=True) == pytest.approx(faithful) and (faithful < 0) == (spread == 0.2)
    assert slope(penalty_gradient="both") == pytest.approx(lam)
    assert slope() == slope(penalty_gradient="none") == 0


# -- which samples are rewarded ------------------------------------------------------------------


@pytest.mark.parametrize("both", [False, True])
def test_samples_with_more_noise_have_the_diffusion_loss_alone(both):
    u, eps = drawn()
    early, (x0, _) = u <= 0.4, data()
    loss, samples, scores, policy = run(CtrlU(both_passes=both))
    theta = policy.denoiser.theta.detach()
    alone = erred(theta, x0, u, eps)
    if both:
        alone = (alone + erred(theta, x0, u + 0.001, eps)) / 2
    assert torch.equal(loss.detach()[~early], alone[~early])
    assert (loss.detach()[early] > alone[early]).all()
    assert torch.equal(scores.value.isnan(), ~early)
    assert [rows for rows, _ in policy.decoded] == [int(early.sum())] * 2  # and the second
    assert samples.prompts == [f"prompt {j}" for j in early.nonzero()[:, 0].tolist()]
    assert not samples.data.requires_grad and not scores.value.requires_grad
    torch.testing.assert_close(scores.parts["diffusion_loss"], alone.float())
    assert torch.equal(scores.parts["rewarded"], early.float())
    assert torch.equal(scores.parts["uncertainty"].isnan(), ~early)


def test_where_none_is_rewarded_the_earliest_is_scored_and_nothing_else():
    u, eps = drawn()
    x0, condition = data()
    earliest = u.argmin()
    options = {"max_time": u.min().item() / 2, "both_passes": False}
    loss, _, scores, policy = run(CtrlU(**options, weight=1e9))
    theta = policy.denoiser.theta
    alone = erred(theta, x0, u, eps)
    assert torch.equal(loss, alone)
    assert torch.equal(gradient(loss, policy), gradient(alone, policy))
    assert policy.decoded == [(1, False), (1, False)]  # no graph through the decoder
    assert (~scores.value.isnan()).nonzero().tolist() == [[earliest]]
    picture = predicted(theta.detach(), x0, u, eps)
    expected = -(torch.tanh(picture) - condition.tensors["control"]).square().mean((1, 2, 3))
    torch.testing.assert_close(scores.value[earliest], expected[earliest].float())
    assert scores.parts["rewarded"].tolist() == [0] * 6
    infinite = as_reward(lambda s: s.data.sum((1, 2, 3)) - math.inf, RewardInfo("never"))
    loss, *_ = run(CtrlU(**options, uncertainty=None), None, infinite)
    assert torch.equal(loss, alone)


def test_the_time_at_the_threshold_is_rewarded_and_all_are_at_one():
    u, _ = drawn()
    threshold = u.sort().values[3].item()
    _, _, scores, _ = run(CtrlU(max_time=threshold))
    assert scores.parts["rewarded"].sum() == 4
    _, _, scores, policy = run(CtrlU(max_time=1.0))
    assert scores.parts["rewarded"].sum() == 6 and policy.decoded[0][0] == 6


def test_times_stay_below_one(monkeypatch):
    """Also where rounding to float32 would make them 1."""
    monkeypatch.setattr(
        ctrl_u, "uniform", lambda n, g: torch.full((n,), 1 - 1e-12, dtype=torch.float64)
    )
    _, _, _, policy = run(CtrlU(interval=0.5))
    for u, _ in policy.calls:
        assert u.dtype == torch.float32 and (u < 1).all() and (u > 0.999).all()


def test_the_second_time_is_later_by_the_interval():
    u, _ = drawn()
    _, _, _, policy = run(CtrlU(interval=0.3))
    first, second = (u for u, _ in policy.calls)
    assert torch.equal(first, u) and torch.equal(second, (u + 0.3).clamp(max=1 - 1e-6))
    assert (u + 0.3 > 1).any()


@pytest.mark.parametrize(
    ("options", "graph"),
    [
        ({}, False),
        ({"penalty_gradient": "none"}, False),
        ({"penalty_gradient": "both"}, True),
        ({"penalty_gradient": "both", "penalty": 0.0}, False),
        ({"faithful": True}, True),
        ({"both_passes": True}, True),
        ({"uncertainty": None}, None),
        ({"uncertainty": "members"}, None),
        ({"uncertainty": "members", "faithful": True}, None),
    ],
)
def test_the_second_prediction_has_no_graph_unless_something_needs_it(options, graph):
    _, _, _, policy = run(CtrlU(**options))
    assert [kept for _, kept in policy.calls] == [True] + [graph] * (graph is not None)
    with torch.no_grad():
        loss, _, _, policy = run(CtrlU(**options))
    assert not loss.requires_grad and not any(kept for _, kept in policy.calls)


# -- weights -------------------------------------------------------------------------------------


@pytest.mark.parametrize("source", ["two_timesteps", "members", "dropout"])
@pytest.mark.parametrize("options", [{}, {"faithful": True}, {"penalty_gradient": "both"}])
def test_without_disagreement_it_is_controlnet_plus_plus_bit_for_bit(source, options):
    reward = ControlReward(Squashed())
    if source == "members":
        reward = ControlReward([Squashed(), Squashed()])
    if source == "dropout":
        reward = ControlReward(Dropped(1e-18))
    # in float32 the second time is the first
    loss, _, scores, policy = run(
        CtrlU(uncertainty=source, interval=1e-12, penalty=3.0, **options), None, reward
    )
    plain, _, other, theirs = run(
        CtrlU(uncertainty=None, interval=1e-12, penalty=3.0), None, reward
    )
    assert torch.equal(loss, plain) and torch.equal(
        scores.value.nan_to_num(9), other.value.nan_to_num(9)
    )
    assert torch.equal(gradient(loss, policy), gradient(plain, theirs))
    scored = ~scores.value.isnan()
    for name, value in [("uncertainty", 0), ("pixel_weight", 1), ("pixel_weight_ess", 1)]:
        assert (scores.parts[name][scored] == value).all()


class Dropped(Extractor):
    name, channels = "dropped", 3

    def __init__(self, p):
        super().__init__()
        self.layer = nn.Dropout(p).eval()

    def __call__(self, images):
        return torch.tanh(self.layer(images))


def test_dropout_compares_with_the_rewards_opinions():
    """Masks are the reward's own; what is made of its opinions is not."""
    reward = ControlReward(Dropped(0.5), num_passes=3)
    loss, _, _, policy = run(CtrlU(uncertainty="dropout", max_time=1.0, tau=0.3), None, reward)
    x0, condition = data()
    u, eps = drawn()
    theta = policy.denoiser.theta.detach()
    picture, control = predicted(theta, x0, u, eps), condition.tensors["control"]
    plain = torch.tanh(picture)
    others = reward.opinions(picture, "dropout")[1:]
    assert len(others) == 3 and not torch.equal(others[0], others[1])
    spread = torch.stack([(other - plain).abs().mean(1) for other in others]).mean(0)
    off = (plain - control).square().mean(1)
    expected = erred(theta, x0, u, eps) + 0.5 * (torch.exp(-spread / 0.3) * off).mean((1, 2))
    expected = expected + 0.1 * spread.mean((1, 2))
    torch.testing.assert_close(loss.detach(), expected, **CLOSE)


def test_logged_parts():
    options = {"uncertainty": "members", "max_time": 1.0, "tau": 0.1}
    _, _, scores, policy = run(CtrlU(**options))
    assert set(scores.parts) == set(CtrlU.logged)
    x0, condition = data()
    u, eps = drawn()
    picture = predicted(policy.denoiser.theta.detach(), x0, u, eps)
    own, *others = (torch.tanh(slope * picture) for slope in SLOPES)
    spread = sum((each - own).abs().mean(1) for each in others) / 2
    w = torch.exp(-spread / 0.1)
    for j in range(6):
        pixels = w[j].flatten()
        expected = {
            "diffusion_loss": erred(policy.denoiser.theta.detach(), x0, u, eps)[j],
            "rewarded": 1.0,
            "uncertainty": spread[j].mean(),
            "pixel_weight": pixels.mean(),
            "pixel_weight_ess": pixels.sum() ** 2 / pixels.square().sum() / len(pixels),
        }
        for name, value in expected.items():
            assert scores.parts[name][j].item() == pytest.approx(float(value), rel=1e-5)
            assert not scores.parts[name].requires_grad
    control = condition.tensors["control"]
    off = sum((each - control).square().mean((1, 2, 3)) for each in (own, *others)) / 3
    torch.testing.assert_close(scores.value, -off.float())


def test_both_passes_log_their_means_and_score_the_first():
    _, _, scores, policy = run(CtrlU(both_passes=True, interval=0.2, tau=0.1, max_time=1.0))
    x0, condition = data()
    u, eps = drawn()
    theta = policy.denoiser.theta.detach()
    times = u, u + 0.2
    first, second = (torch.tanh(predicted(theta, x0, t, eps)) for t in times)
    spread = (first - second).abs().mean(1)  # of both
    torch.testing.assert_close(scores.parts["uncertainty"], spread.mean((1, 2)).float())
    weights = torch.exp(-spread / 0.1).mean((1, 2))
    torch.testing.assert_close(scores.parts["pixel_weight"], weights.float())
    off = (first - condition.tensors["control"]).square().mean((1, 2, 3))
    torch.testing.assert_close(scores.value, -off.float())
    errors = [erred(theta, x0, t, eps) for t in times]
    torch.testing.assert_close(scores.parts["diffusion_loss"], (sum(errors) / 2).float())


def test_shuffled_weights_are_the_same_ones_elsewhere():
    """The loss is 1 at one pixel: it shows the weight there."""
    n, places = 80, torch.linspace(0, 1.5, SIDE * SIDE, dtype=torch.float64).view(1, 1, SIDE, SIDE)
    x0 = torch.zeros(n, 3, SIDE, SIDE, dtype=torch.float64)
    control = torch.zeros_like(x0)
    control[:, :, 1, 2] = 1.0
    condition = Condition([""] * n, {"control": control})
    reward = Watched([Plain(), Plain(places)])
    options = {"uncertainty": "members", "weight": 1.0, "penalty": 0.0, "max_time": 1.0}

    def found(shuffled, own=None):
        still = Later((0.0, 0.0, 0.0))
        loss, _, scores, _ = run(
            CtrlU(shuffled=shuffled, **options), still, reward, x0, condition, own
        )
        return loss.detach() * SIDE * SIDE, scores

    weights = torch.exp(-places.flatten())
    straight, scores = found(False)
    assert torch.allclose(straight, weights[1 * SIDE + 2], rtol=1e-6)
    shuffled, theirs = found(True)
    nearest = (shuffled[:, None] - weights).abs().min(1)
    assert (nearest.values < 1e-6).all()
    assert len(nearest.indices.unique()) == SIDE * SIDE  # each weight comes there
    assert torch.equal(shuffled, found(True)[0])  # by the same generators
    for name in ("pixel_weight", "pixel_weight_ess"):
        torch.testing.assert_close(theirs.parts[name], scores.parts[name])
    one, _ = found(True, torch.Generator().manual_seed(0))
    assert len(one.unique()) > 8  # one generator for all


# -- segmentation --------------------------------------------------------------------------------


class Painted(Toy):
    """The first prediction is x0, the second a given other picture; both move with theta."""

    def __init__(self, other):
        super().__init__((0.0, 0.0, 0.0))
        self.other = other

    def denoise(self, x0, u, eps, condition):
        x = self.other if self.calls else x0
        self.calls.append((u, torch.is_grad_enabled()))
        theta = self.denoiser.theta
        return x + theta.view(1, 3, 1, 1), 0 * theta.sum() + torch.zeros(len(x), dtype=x.dtype)


PALETTE = [(255, 255, 255), (220, 40, 40), (40, 90, 220)]
SEGMENTATION = {"name": "segmentation", "palette": PALETTE, "temperature": 0.5}


def painted(n=2, seed=3):
    """Two pictures each, control images with some grey pixels, and their labels."""
    g = torch.Generator().manual_seed(seed)
    first, second = (torch.rand(n, 3, SIDE, SIDE, generator=g, dtype=torch.float64) for _ in "ab")
    labels = torch.randint(0, 3, (n, SIDE, SIDE), generator=g)
    control = torch.tensor(PALETTE, dtype=torch.float64)[labels].permute(0, 3, 1, 2) / 255
    grey = torch.rand(n, SIDE, SIDE, generator=g) < 0.3
    control = torch.where(grey[:, None], 0.5, control)
    return first, second, control, labels, grey


def test_segmentation_is_weighted_by_kl_of_the_second_from_the_first():
    first, second, control, labels, grey = painted()
    reward = ControlReward(SEGMENTATION)
    policy = Painted(second)
    condition = Condition(["a", "b"], {"control": control})
    loss, _, scores, _ = run(
        CtrlU(weight=0.7, penalty=0.2, tau=0.6, max_time=1.0), policy, reward, first, condition
    )

    def law(picture):
        colours = torch.tensor(PALETTE, dtype=torch.float64) / 255
        off = (picture.permute(0, 2, 3, 1)[..., None, :] - colours).square().sum(-1)
        return torch.distributions.Categorical(logits=-off / 0.5)

    p, q = law(first), law(second)
    spread = torch.distributions.kl_divergence(q, p)
    off, weight = -p.log_prob(labels), torch.exp(-spread / 0.6)
    expected, value, uncertainty = [], [], []
    for j in range(2):
        counts = ~grey[j]
        assert 0 < counts.sum() < SIDE * SIDE
        loss_j = 0.7 * (weight[j] * off[j])[counts].mean() + 0.2 * spread[j][counts].mean()
        expected.append(loss_j)
        value.append(-off[j][counts].mean().float())
        uncertainty.append(spread[j][counts].mean().float())
    assert spread.mean() > 0.05
    torch.testing.assert_close(loss.detach(), torch.stack(expected), rtol=1e-5, atol=1e-8)
    torch.testing.assert_close(scores.value, torch.stack(value))
    torch.testing.assert_close(scores.parts["uncertainty"], torch.stack(uncertainty))


def test_pixels_without_a_label_count_nowhere():
    first, second, control, _, grey = painted()
    control[1] = 0.5  # none has
    condition = Condition(["a", "b"], {"control": control})

    def found(x0, other):
        algorithm = CtrlU(max_time=1.0, penalty=1.0)
        reward = ControlReward(SEGMENTATION)
        loss, _, scores, policy = run(algorithm, Painted(other), reward, x0, condition)
        numbers = torch.stack([scores.value, *scores.parts.values()])
        return loss.detach(), numbers, gradient(loss, policy)

    loss, numbers, g = found(first, second)
    assert loss[0] > 0 and loss[1] == 0 and g.isfinite().all()
    moved = [torch.where(grey[:, None], 1 - x, x) for x in (first, second)]
    for mine, theirs in zip((loss, numbers[:, 0], g), (lambda f: (f[0], f[1][:, 0], f[2]))(
        found(*moved)
    ), strict=True):  # fmt: skip
        assert torch.equal(mine, theirs)


# -- rewards of whole pictures -------------------------------------------------------------------


def bright(upper=2.0, **info):
    info = {"range": (-math.inf, upper), "differentiable": True, **info}
    return as_reward(lambda s: torch.tanh(s.data.mean((1, 2, 3))), RewardInfo("bright", **info))


@pytest.mark.parametrize("weigh", [True, False])
@pytest.mark.parametrize("upper", [2.0, math.inf])
def test_rewards_of_whole_pictures_have_one_weight_each(weigh, upper):
    if weigh and upper == math.inf:
        return
    reward = bright(upper)
    options = {"weight": 0.8, "penalty": 0.3, "tau": 0.05, "interval": 0.2, "max_time": 1.0}
    loss, _, scores, policy = run(CtrlU(weigh=weigh, **options), None, reward)
    x0, _ = data()
    u, eps = drawn()
    theta = policy.denoiser.theta

    def value(t, weights):
        return torch.tanh(predicted(weights, x0, t, eps).mean((1, 2, 3)))

    r, later = value(u, theta), value((u + 0.2).clamp(max=1 - 1e-6), theta).detach()
    spread = (later - r).abs()
    w = torch.exp(-spread.detach() / 0.05) if weigh else 1.0
    off = (2.0 if upper == 2.0 else 0.0) - r
    expected = erred(theta, x0, u, eps) + 0.8 * w * off + 0.3 * spread
    single = {"rtol": 1e-5, "atol": 1e-6}  # rewards are float32
    torch.testing.assert_close(loss, expected, **single)
    torch.testing.assert_close(gradient(loss, policy), gradient(expected, policy), **single)
    torch.testing.assert_close(scores.value, r.detach().float(), **single)  # the reward's own
    torch.testing.assert_close(scores.parts["uncertainty"], spread.detach().float(), **single)


def test_rewards_that_do_not_fit_are_refused():
    CtrlU().check(bright())
    CtrlU().check(reward_of())
    CtrlU(uncertainty="members").check(reward_of("members"))
    CtrlU(uncertainty=None).check(bright(math.inf))
    CtrlU(weigh=False).check(bright(math.inf))
    with pytest.raises(ValueError, match="must not be negative.* upper end.*'bright' declares no"):
        CtrlU().check(bright(math.inf))
    for source in ("members", "tta", "dropout"):
        for weigh in (True, False):
            with pytest.raises(ValueError, match=f"'{source}' needs a reward that reads condition"):
                CtrlU(uncertainty=source, weigh=weigh).check(bright())
    with pytest.raises(ValueError, match="'control_squashed' has one extractor; give it a list"):
        CtrlU(uncertainty="members").check(reward_of())
    CtrlU(uncertainty="tta").check(reward_of())
    with pytest.raises(ValueError, match="CtrlU needs a differentiable reward, and 'bright'"):
        CtrlU().check(bright(differentiable=False))


# -- options -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"uncertainty": "two_timestep"}, "uncertainty of CtrlU is one of two_timesteps, members"),
        ({"penalty_gradient": "all"}, "penalty_gradient of CtrlU is one of none, primary, both"),
        ({"weight": -0.1}, "weight of CtrlU must be finite and not negative, but -0.1"),
        ({"weight": math.inf}, "weight of CtrlU must be finite"),
        ({"penalty": -1.0}, "penalty of CtrlU must be finite and not negative, but -1.0"),
        ({"penalty": math.nan}, "penalty of CtrlU must be finite"),
        ({"max_time": 0.0}, r"max_time .* in \(0, 1\] \(400 of 1000 are 0.4\), but 0.0 came"),
        ({"max_time": 400.0}, "max_time .* but 400.0 came"),
        ({"interval": 0.0}, "interval .* but 0.0 came"),
        ({"interval": 1.0}, r"interval .* in \(0, 1\) \(1 of 1000 is 0.001\), but 1.0 came"),
        ({"tau": 0.0}, "tau of CtrlU must be positive and finite, but 0.0 came"),
        ({"tau": math.inf}, "tau of CtrlU must be positive"),
        ({"ramp": -0.1}, r"ramp of CtrlU is a share of the run in \[0, 1\], but -0.1"),
        ({"ramp": 1.1}, "ramp of CtrlU .* but 1.1 came"),
    ],
)
def test_options_out_of_range(options, says):
    with pytest.raises(ValueError, match=says):
        CtrlU(**options)


def test_ends_of_ranges_are_allowed():
    CtrlU(weight=0.0, penalty=0.0, max_time=1.0, ramp=1.0, uncertainty=None)


def test_the_weight_rises():
    algorithm = CtrlU(weight=0.8, ramp=0.5)
    weights = [algorithm.at(progress).weight for progress in (0.0, 0.125, 0.25, 0.5, 0.9)]
    assert weights == pytest.approx([0.0, 0.2, 0.4, 0.8, 0.8])
    assert CtrlU(weight=0.8).at(0.0) == CtrlU(weight=0.8)
    part, _, _, _ = run(algorithm.at(0.125))
    torch.testing.assert_close(part, run(CtrlU(weight=0.2))[0])


def test_presets():
    assert make_algorithm("ctrl_u") == CtrlU()
    assert make_algorithm({"name": "ctrl_u", "preset": "paper"}) == CtrlU(
        faithful=True, both_passes=True
    )
    plain = make_algorithm({"name": "ctrl_u", "preset": "controlnet_plus_plus", "weight": 1.0})
    assert plain == CtrlU(uncertainty=None, max_time=0.2, weight=1.0)
    assert CtrlU.needs_data and CtrlU().family == "pathwise"


# -- batches and learning ------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"shuffled": True, "tau": 0.01}, {"both_passes": True}])
def test_pieces_change_nothing(options):
    algorithm = CtrlU(interval=0.1, **options)
    loss, _, scores, policy = run(algorithm)
    x0, condition = data()
    losses, total = [], 0
    for rows in torch.arange(6).split(2):
        own = [generators()[j] for j in rows.tolist()]
        part, _, theirs, other = run(algorithm, None, None, x0[rows], condition.take(rows), own)
        losses.append(part)
        total = total + gradient(part, other)
        rewarded = theirs.parts["rewarded"] == 1
        torch.testing.assert_close(theirs.value[rewarded], scores.value[rows][rewarded])
    torch.testing.assert_close(torch.cat(losses), loss, rtol=1e-12, atol=0)
    torch.testing.assert_close(total, gradient(loss, policy), rtol=1e-12, atol=0)
    assert (loss != run(CtrlU(interval=0.1))[0]).any() or not options


class Flat(Toy):
    """Every prediction is the picture whose channels are theta."""

    def denoise(self, x0, u, eps, condition):
        x = self.denoiser.theta.view(1, 3, 1, 1).expand_as(x0)
        return x, 0 * self.denoiser.theta.sum() + torch.zeros(len(x0), dtype=torch.float64)


@pytest.mark.parametrize("source", [None, "two_timesteps", "members"])
def test_learning_ends_at_the_weighted_mean_of_the_control(source):
    """The second reader is off by the same at each pixel, so that U is that, and w exp(-U)."""
    x0, condition = data()
    control = condition.tensors["control"]
    off = torch.linspace(0, 3, SIDE * SIDE, dtype=torch.float64).view(1, 1, SIDE, SIDE)
    reward = Watched([Plain(), Plain(off)])
    w = torch.exp(-off) if source == "members" else torch.ones_like(off)
    expected = (w * control).sum((0, 2, 3)) / (w.sum() * len(x0))
    policy = Flat()
    optimiser = torch.optim.SGD(policy.denoiser.parameters(), lr=2.0)
    algorithm = CtrlU(uncertainty=source, weight=1.0, max_time=1.0, penalty_gradient="both")
    values = []
    for _ in range(60):
        loss, _, scores, _ = run(algorithm, policy, reward, x0, condition)
        optimiser.zero_grad()
        loss.mean().backward()
        optimiser.step()
        values.append(scores.value.mean().item())
    assert values[-1] > values[0] + 0.1
    torch.testing.assert_close(policy.denoiser.theta.detach(), expected, rtol=1e-4, atol=1e-4)
    if source == "members":
        assert (expected - control.mean((0, 2, 3))).abs().max() > 0.01
