import math

import pytest
import torch
from algorithms.chains import LinearChain, credit, gradient, matrices, quadrature, train
from torch.testing import assert_close

from diffreward.algorithms import make_algorithm
from diffreward.algorithms.dpok import DPOK
from diffreward.rewards import Scores

W, ALPHA, BETA = 0.7, 2.0, 0.9


@pytest.mark.parametrize("baseline", ["group", "none"])
def test_expected_gradient_is_that_of_reward_and_kl(baseline):
    chain = LinearChain((0.9, 0.6), (0.1, 0.3), (0.5, 0.4))
    reference = chain.reference()
    chain.shift.data = torch.tensor([0.31, -0.17], dtype=torch.float64)
    trajectory, groups = quadrature(chain, 3)
    algorithm = DPOK(reward_weight=ALPHA, beta_kl=BETA, baseline=baseline)
    for reward, slope in (
        (lambda x: W * x + 9, W),
        (lambda x: -((x - 1.2) ** 2) / 2, 1.2 - chain.mean_end()),
    ):
        grad = gradient(algorithm, chain, reference, trajectory, groups, reward)
        climb = ALPHA * slope * chain.tail[1:]
        objective = climb - BETA * chain.shift.detach() / chain.sigma**2
        assert_close(grad, -objective / 2, rtol=1e-10, atol=1e-12)  # mean over the two steps


def test_reaches_the_optimum():
    algorithm = DPOK(reward_weight=ALPHA, beta_kl=BETA, shared_noise=True, passes=2)
    chain = train(algorithm, LinearChain(), lambda x: W * x, iterations=150, lr=0.03)
    assert_close(chain.shift.detach(), chain.optimum(ALPHA * W, BETA), atol=0.03, rtol=0)


def test_ratio_is_clipped_on_both_sides_whatever_the_advantage():
    steps = torch.tensor([[-0.5, -0.1, 0.0, 0.1, 0.5]] * 2, dtype=torch.float64)
    log_prob, zero = steps.clone().requires_grad_(), torch.zeros_like(steps)
    kl = torch.zeros_like(steps).requires_grad_()
    scores = Scores(torch.tensor([1.5, -1.5]))
    algorithm = DPOK(reward_weight=ALPHA, beta_kl=BETA, clip=0.2)
    loss = algorithm.loss(log_prob, zero, None, scores, torch.zeros(2).long(), kl)
    inside = torch.tensor([0.0, math.exp(-0.1), 1.0, math.exp(0.1), 0.0]).double()
    grad, kl_grad = torch.autograd.grad(loss, (log_prob, kl))
    assert_close(grad, torch.stack([-1.5 * inside, 1.5 * inside]) * ALPHA / 10)
    assert_close(kl_grad, torch.full_like(kl, BETA / 10))
    numbers = algorithm.diagnostics(log_prob, zero, None, scores, torch.zeros(2).long())
    assert numbers["clip_fraction"] == pytest.approx(0.4)


def test_preset_is_in_the_authors_convention():
    preset = make_algorithm({"name": "dpok", "preset": "paper"})
    log_prob, old, _ = matrices(4, 3)
    kl = torch.rand(4, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    value = torch.tensor([0.5, -0.5, 1.0, 2.0])
    loss = preset.loss(log_prob, old, None, Scores(value), torch.zeros(4).long(), kl)
    ratio = ((log_prob - old) / 16384).exp().clamp(0.9999, 1.0001)
    expected = (-10 * value[:, None].double() * ratio).mean() + 0.01 * (kl / 16384).mean()
    assert_close(loss, expected)
    assert preset.passes == 5 and preset.needs_kl and not preset.needs_reference


def test_advantages():
    value, groups = torch.tensor([1.0, 10.0, 3.0, 20.0]), torch.tensor([7, 2, 7, 2])
    assert_close(credit(DPOK(), value, groups).value, torch.tensor([-2.0, -10, 2, 10]).double())
    assert_close(credit(DPOK(baseline="none"), value, groups).value, value.double())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"beta_kl": 0.0}, "DPOK needs beta_kl above 0"),
        ({"clip": 1.0}, r"in \(0, 1\)"),
        ({"reward_weight": -1.0}, "reward_weight above 0"),
        ({"baseline": "value"}, "one of group, none, but 'value' came"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        make_algorithm({"name": "dpok", **options})


def test_bad_input_is_refused():
    log_prob, old, _ = matrices(2, 2)
    with pytest.raises(ValueError, match="kl is None"):
        DPOK().loss(log_prob, old, None, Scores(torch.ones(2)), torch.zeros(2).long())
    with pytest.raises(ValueError, match="at least two"):
        credit(DPOK(), torch.zeros(1), torch.zeros(1).long())
    with pytest.raises(ValueError, match="DPOK compares rewards"):
        credit(DPOK(), torch.tensor([0.0, math.inf]), torch.zeros(2).long())
