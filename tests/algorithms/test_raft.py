"""RAFT: selection by hand, and the drift of a Gaussian by order statistics."""

import math

import pytest
import torch

from diffreward.algorithms import History, make_algorithm
from diffreward.algorithms.raft import RAFT
from diffreward.rewards import Scores

INF = math.inf


def weights(algorithm, rewards, groups):
    scores = Scores(torch.tensor(rewards, dtype=torch.float64))
    groups = torch.tensor(groups)
    return algorithm.credit(scores, groups, [""] * len(groups), History()).value


def test_the_best_of_each_group_is_kept_where_groups_interleave():
    got = weights(RAFT(), [1.0, 5.0, 3.0, 2.0, -1.0, 4.0], [7, 2, 7, 2, 7, 2])
    assert got.tolist() == [0, 1, 1, 0, 0, 0]


def test_of_equals_the_first_is_kept():
    n = 200  # sorts of short lists are stable by themselves
    got = weights(RAFT(keep=2), [1.0] * n + [0.0, 2.0, 2.0, 2.0], [0] * n + [1] * 4)
    assert got.nonzero()[:, 0].tolist() == [0, 1, n + 1, n + 2]


@pytest.mark.parametrize("seed", range(5))
def test_selection_is_argmax_on_random_groups(seed):
    g = torch.Generator().manual_seed(seed)
    groups = torch.arange(12).repeat(5)[torch.randperm(60, generator=g)]
    rewards = torch.randn(60, generator=g, dtype=torch.float64)
    got = weights(RAFT(), rewards.tolist(), groups.tolist())
    for group in range(12):
        rows = (groups == group).nonzero()[:, 0]
        best = rows[rewards[rows].argmax()]
        assert got[rows].tolist() == (rows == best).double().tolist()


def test_top_k_shares_the_weight():
    got = weights(RAFT(keep=2), [1.0, 5.0, 3.0, 2.0], [0, 0, 0, 0])
    assert got.tolist() == [0, 0.5, 0.5, 0]


def test_reward_weighted_regression():
    """exp(r / 2) / sum: rewards 0 and 2 ln 3 weigh 1 to 3; a shift changes nothing."""
    algorithm = RAFT(keep=None, temperature=2.0)
    for shift in (0.0, 1000.0):
        got = weights(algorithm, [shift, shift + 2 * math.log(3), 5.0], [0, 0, 1])
        torch.testing.assert_close(got, torch.tensor([0.25, 0.75, 1.0], dtype=torch.float64))
    cold = weights(RAFT(keep=None, temperature=1e-4), [1.0, 2.0, 1.5], [0, 0, 0])
    torch.testing.assert_close(cold, weights(RAFT(), [1.0, 2.0, 1.5], [0, 0, 0]))


def test_samples_that_violate_a_constraint_are_never_kept():
    rewards, groups = [-INF, -INF, -INF, 1.0], [0, 0, 1, 1]
    assert weights(RAFT(), rewards, groups).tolist() == [0, 0, 0, 1]
    assert weights(RAFT(keep=2), rewards, groups).tolist() == [0, 0, 0, 1]
    soft = weights(RAFT(keep=None, temperature=1.0), rewards, groups)
    assert soft.tolist() == [0, 0, 0, 1]
    error = torch.ones(4, 1, dtype=torch.float64, requires_grad=True)
    loss = RAFT().loss(error, None, Scores(torch.zeros(4)), torch.tensor(groups))
    loss.backward()
    assert loss == 0 and (error.grad == 0).all()


def test_loss_is_the_mean_error_of_the_kept():
    groups = torch.tensor([0, 1, 0, 1])
    scores = RAFT(keep=1).credit(
        Scores(torch.tensor([1.0, 0.0, 0.0, 2.0])), groups, ["a", "b", "a", "b"], History()
    )
    error = torch.tensor([[1.0, 3.0], [9.0, 9.0], [9.0, 9.0], [5.0, 7.0]], dtype=torch.float64)
    error.requires_grad_()
    loss = RAFT().loss(error, None, scores, groups)
    torch.testing.assert_close(loss.item(), (2.0 + 6.0) / 2)
    loss.backward()
    # exact zeros: the engine computes nothing for the rest
    assert error.grad.tolist() == [[0.25, 0.25], [0, 0], [0, 0], [0.25, 0.25]]


def test_a_minibatch_of_whole_groups_has_the_loss_of_those_groups():
    g = torch.Generator().manual_seed(0)
    groups, rewards = torch.arange(4).repeat(3), torch.randn(12, generator=g)
    error = torch.randn(12, 2, generator=g, dtype=torch.float64)
    algorithm = RAFT()
    scores = algorithm.credit(Scores(rewards), groups, [""] * 12, History())
    whole = algorithm.loss(error, None, scores, groups)
    parts = []
    for half in (groups < 2, groups >= 2):
        rows = half.nonzero()[:, 0]
        parts.append(algorithm.loss(error[rows], None, scores.take(rows), groups[rows]))
    torch.testing.assert_close(sum(parts) / 2, whole)


MAX_OF_NORMALS = {2: 1 / math.sqrt(math.pi), 3: 1.5 / math.sqrt(math.pi), 4: 1.0293753730}
"""E of the largest of N standard normals (David & Nagaraja, Order Statistics, 3rd ed.)."""


@pytest.mark.parametrize("n", [2, 3, 4])
def test_rounds_move_a_gaussian_by_order_statistics(n):
    """Model N(mu, 1), reward x: the kept samples have mean mu + E max of N, and so has the fit.

    The denoising error is (x - mu)^2, of which one Newton step finds the minimum.
    """
    prompts, mu = 20_000, torch.zeros((), dtype=torch.float64, requires_grad=True)
    groups, g = torch.arange(prompts).repeat_interleave(n), torch.Generator().manual_seed(0)
    algorithm = RAFT()
    for k in range(1, 4):
        x = mu.detach() + torch.randn(prompts * n, generator=g, dtype=torch.float64)
        scores = algorithm.credit(Scores(x), groups, [""] * len(x), History())
        loss = algorithm.loss(((x - mu) ** 2)[:, None], None, scores, groups)
        (gradient,) = torch.autograd.grad(loss, mu)
        with torch.no_grad():
            mu -= gradient / 2
        error = abs(mu.item() - k * MAX_OF_NORMALS[n])
        assert error < 4 * math.sqrt(k / prompts)  # the maximum's variance is below 1


def test_reward_weighted_regression_tilts_a_gaussian():
    """Weights exp(x / tau) on N(0, 1) in large groups: the fit is the tilted mean, 1 / tau."""
    n, tau = 100_000, 2.0
    x = torch.randn(n, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    groups = torch.zeros(n, dtype=torch.long)
    algorithm = RAFT(keep=None, temperature=tau)
    scores = algorithm.credit(Scores(x), groups, [""] * n, History())
    mu = torch.zeros((), dtype=torch.float64, requires_grad=True)
    loss = algorithm.loss(((x - mu) ** 2)[:, None], None, scores, groups)
    (gradient,) = torch.autograd.grad(loss, mu)
    assert abs(-gradient.item() / 2 - 1 / tau) < 0.02


def test_options_out_of_range():
    for options, says in [
        ({"keep": 0}, "keep must be 1 or more"),
        ({"temperature": 0.0}, "temperature must be positive"),
        ({"num_draws": 0}, "num_draws must be 1 or more"),
        ({"passes": 0}, "passes must be 1 or more"),
        ({"minibatches": 0}, "minibatches must be 1 or more"),
    ]:
        with pytest.raises(ValueError, match=says):
            RAFT(**options)
    with pytest.raises(ValueError, match="keep=3 .* there are 2"):
        weights(RAFT(keep=3), [1.0, 2.0], [0, 0])


def test_as_the_engine_sees_it():
    algorithm = make_algorithm({"name": "raft", "num_draws": 4, "passes": 2})
    assert algorithm.family == "denoising" and not algorithm.needs_reference
    assert (algorithm.num_draws, algorithm.passes) == (4, 2)
    assert make_algorithm({"name": "raft", "preset": "rwr"}).keep is None
