"""ReFL against closed forms on a linear chain."""

import math

import pytest
import torch
from linear_chain import LinearChain, gradients, prompts, quadratic, scorer

from diffreward.algorithms import make_algorithm
from diffreward.algorithms.refl import ReFL
from diffreward.policy import randn, sample_generators
from diffreward.rewards import as_reward
from diffreward.rewards.base import RewardInfo

T = 5
CLOSE = {"rtol": 1e-5, "atol": 1e-9}


def drawn(algorithm, policy, n):
    """Steps, and the path of every sample, from the noise that the generators give."""
    generators = sample_generators(0, 1, n)
    x = randn((n, 2), generators, dtype=torch.float64)
    at = algorithm.steps(T, n, generators)
    z = [randn((n, 2), generators, dtype=torch.float64) for _ in range(T)]
    c = policy.encode(prompts(n)).tensors["centre"]
    return at, c, policy.path(c, x, z)


def expected_gradient(policy, at, c, xs):
    """d reward(x0(x[i])) / d (w, b) at each sample's step i; x0 = (x - s output) / a."""
    w, b = policy.denoiser.w.detach(), policy.denoiser.b.detach()
    gradient = torch.zeros(len(c), 2, T, dtype=torch.float64)
    rewards = torch.zeros(len(c), dtype=torch.float64)
    for j, i in enumerate(at.tolist()):
        x, s, a = xs[i][j], policy.s[i], policy.a[i]
        x0 = (x - s * (w[i] * x + b[i] * c[j])) / a
        flow = -(x0 - c[j]) * -s / a
        gradient[j, 0, i], gradient[j, 1, i] = (flow * x).sum(), (flow * c[j]).sum()
        rewards[j] = -((x0 - c[j]) ** 2).sum() / 2
    return gradient, rewards


@pytest.mark.parametrize("split", [None, 1, 3])
@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_gradient_is_that_of_one_clean_prediction_whatever_the_batch(split, eta):
    policy, n = LinearChain(eta), 8
    algorithm = ReFL(weight=0.5, margin=None, start=0.2)
    at, c, xs = drawn(algorithm, policy, n)
    assert len(at.unique()) >= 3 and at.tolist() != sorted(at.tolist())
    gradient, rewards = expected_gradient(policy, at, c, xs)
    found, losses = gradients(algorithm, policy, prompts(n), split=split)
    torch.testing.assert_close(found, -0.5 * gradient, **CLOSE)
    torch.testing.assert_close(losses, (-0.5 * rewards).float())


def test_rewards_above_the_margin_teach_nothing():
    policy, n = LinearChain(1.0), 8
    at, c, xs = drawn(ReFL(start=0.2), policy, n)
    gradient, rewards = expected_gradient(policy, at, c, xs)
    margin = rewards.sort().values[n // 2].item() + 3 + 1e-4  # half of the samples are above
    algorithm = ReFL(weight=1e-3, margin=margin, start=0.2)
    found, losses = gradients(algorithm, policy, prompts(n), scorer(quadratic(offset=3.0)))
    short = rewards + 3 < margin
    assert 3 <= short.sum() <= 5
    expected = torch.where(short[:, None, None], -1e-3 * gradient, 0.0)
    torch.testing.assert_close(found, expected, **CLOSE)
    torch.testing.assert_close(losses, (1e-3 * (margin - rewards - 3).relu()).float())
    assert (found[~short] == 0).all()


def test_steps_are_uniform_over_the_published_window():
    n = 20_000
    at = make_algorithm("refl").steps(40, n, torch.Generator().manual_seed(0))
    counts = torch.bincount(at, minlength=40)
    assert len(counts) == 40 and counts[:30].sum() == 0
    assert (counts[30:] - n / 10).abs().max() < 5 * math.sqrt(n / 10)


@pytest.mark.parametrize(
    ("num_steps", "start", "end", "window"),
    [
        (40, 0.5, 0.75, range(20, 30)),
        (1, 0.75, 1.0, range(1)),
        (2, 0.9, 1.0, range(1, 2)),
        (4, 0.5, 0.55, range(2, 3)),
        (10, 0.0, 1.0, range(10)),
    ],
)
def test_window_of_short_chains_holds_a_step(num_steps, start, end, window):
    at = ReFL(start=start, end=end).steps(num_steps, 500, torch.Generator().manual_seed(0))
    assert set(at.tolist()) == set(window)


def test_network_calls():
    """One graph per sample, and no step after the one that is differentiated."""
    policy, n = LinearChain(1.0), 8
    algorithm = ReFL(start=0.2)
    at, _, _ = drawn(algorithm, policy, n)
    policy.denoiser.calls.clear()
    algorithm.loss(policy, policy.encode(prompts(n)), sample_generators(0, 1, n), scorer())
    calls = policy.denoiser.calls
    assert sum(rows for _, rows, recorded in calls if recorded) == n
    assert sum(rows for _, rows, _ in calls) == (at + 1).sum()
    recorded = [(i, rows) for i, rows, recorded in calls if recorded]
    assert recorded == [(i, int((at == i).sum())) for i in at.unique().tolist()]


def test_training_reaches_the_best_reward():
    """The prediction can be exact, at every step that is trained: reward 0."""
    policy = LinearChain(1.0)
    names = ["0.8", "-0.5"] * 16
    algorithm = ReFL(weight=1.0, margin=None, start=0.6)
    optimiser = torch.optim.Adam(policy.denoiser.parameters(), lr=0.1)
    condition, generator = policy.encode(names), torch.Generator().manual_seed(0)
    rewards = []
    for _ in range(250):
        loss, _, scores = algorithm.loss(policy, condition, generator, scorer())
        optimiser.zero_grad()
        loss.mean().backward()
        optimiser.step()
        rewards.append(scores.value.mean().item())
    assert rewards[0] < -0.1
    assert sum(rewards[-50:]) / 50 > -0.005


def test_rewards_without_gradient_are_refused():
    dead = as_reward(lambda s: s.data.sum(1), RewardInfo("jpeg", differentiable=False))
    with pytest.raises(ValueError, match="ReFL needs a differentiable reward, and 'jpeg'"):
        ReFL().check(dead)
    policy = LinearChain()
    rounded = scorer(as_reward(lambda s: s.data.detach().sum(1)))
    with pytest.raises(ValueError, match="ReFL needs a gradient"):
        ReFL().loss(policy, policy.encode(["1"]), sample_generators(0, 1, 1), rounded)


def test_options_out_of_range():
    for options, says in [
        ({"weight": 0.0}, "weight must be positive"),
        ({"margin": math.inf}, "margin must be finite"),
        ({"start": 0.5, "end": 0.5}, "start < end"),
        ({"start": -0.1}, "fractions of the chain"),
        ({"end": 1.1}, "fractions of the chain"),
    ]:
        with pytest.raises(ValueError, match=says):
            ReFL(**options)


def test_defaults_are_the_papers():
    assert make_algorithm("refl") == make_algorithm({"name": "refl", "preset": "paper"})
