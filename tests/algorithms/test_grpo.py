import math

import pytest
import torch
from algorithms.chains import LinearChain, credit, gradient, matrices, quadrature, train
from torch.testing import assert_close

from diffreward.algorithms import make_algorithm
from diffreward.algorithms.grpo import GRPO
from diffreward.rewards import Scores

W, BETA = 0.7, 0.5


def chain_of_two():
    chain = LinearChain((0.9, 0.6), (0.1, 0.3), (0.5, 0.4))
    reference = chain.reference()
    chain.shift.data = torch.tensor([0.31, -0.17], dtype=torch.float64)
    return chain, reference


@pytest.mark.parametrize("size", [2, 3])
def test_expected_gradient_is_the_shortened_policy_gradient_and_that_of_the_kl(size):
    chain, reference = chain_of_two()
    trajectory, groups = quadrature(chain, size)
    for reward, slope in (
        (lambda x: W * x + 9, W),
        (lambda x: -((x - 1.2) ** 2) / 2, 1.2 - chain.mean_end()),
    ):
        for beta in (0.0, BETA):
            algorithm = GRPO(std="none", advantage_clip=1e3, beta_kl=beta)
            grad = gradient(algorithm, chain, reference, trajectory, groups, reward)
            climb = (1 - 1 / size) * slope * chain.tail[1:]
            objective = climb - beta * chain.shift.detach() / chain.sigma**2
            assert_close(grad, -objective / 2, rtol=1e-10, atol=1e-12)  # mean over two steps


def test_global_std_divides_by_that_of_all_rewards():
    chain, reference = chain_of_two()
    trajectory, groups = quadrature(chain, 2)
    algorithm = GRPO(std="global", advantage_clip=1e3)
    grad = gradient(algorithm, chain, reference, trajectory, groups, lambda x: W * x + 9)
    std = W * math.hypot(chain.tail[0], *(chain.sigma * chain.tail[1:]))
    assert_close(grad, -0.5 * W * chain.tail[1:] / (std + 1e-4) / 2, rtol=1e-10, atol=1e-12)


def test_reaches_the_optimum_with_kl():
    algorithm = GRPO(std="none", beta_kl=BETA, shared_noise=True, passes=2)
    chain = train(algorithm, LinearChain(), lambda x: W * x, iterations=150, lr=0.03)
    # the group mean includes the sample itself
    expected = (1 - 1 / 8) * chain.optimum(W, BETA)
    assert_close(chain.shift.detach(), expected, atol=0.02, rtol=0)


def test_advantages_are_relative_to_the_group():
    value = torch.tensor([1.0, 10.0, 3.0, 20.0, 5.0])
    groups = torch.tensor([7, 2, 7, 2, 7])
    one, two, all_ = math.sqrt(8 / 3) + 1e-4, 5 + 1e-4, value.double().std(correction=0) + 1e-4
    diff = torch.tensor([-2.0, -5.0, 0.0, 5.0, 2.0]).double()
    for std, scale in (
        ("group", torch.tensor([one, two, one, two, one]).double()),
        ("global", all_),
        ("none", 1.0),
    ):
        assert_close(credit(GRPO(std=std), value, groups).value, diff / scale)
    clipped = credit(GRPO(std="none", advantage_clip=3.0), value, groups).value
    assert_close(clipped, diff.clamp(-3, 3))
    assert credit(GRPO(), torch.full((4,), 0.1), torch.zeros(4).long()).value.abs().max() < 1e-9


def test_last_steps_are_left_out():
    log_prob, old, _ = matrices(4, 10, scale=0.1)
    kl = torch.rand(4, 10, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    kl.requires_grad_()
    scores, groups = Scores(torch.tensor([1.0, -1.0, 2.0, -2.0])), torch.arange(4) // 2
    for fraction, steps in ((0.99, 9), (0.5, 5), (0.01, 1), (1.0, 10)):
        part = GRPO(timestep_fraction=fraction, beta_kl=0.3, clip=0.9)
        loss = part.loss(log_prob, old, None, scores, groups, kl)
        grads = torch.autograd.grad(loss, (log_prob, kl))
        for grad in grads:
            assert (grad[:, :steps] != 0).all() and (grad[:, steps:] == 0).all()
        whole = GRPO(beta_kl=0.3, clip=0.9).loss(
            log_prob[:, :steps], old[:, :steps], None, scores, groups, kl[:, :steps]
        )
        assert_close(loss, whole)


def test_flow_grpo_preset_in_the_authors_convention():
    preset = make_algorithm({"name": "grpo", "preset": "flow_grpo"})
    dims, num_steps = 65536, 10
    log_prob, old, _ = matrices(6, num_steps, scale=3.0)
    g = torch.Generator().manual_seed(0)
    dt = torch.full((num_steps,), 1 / num_steps, dtype=torch.float64)
    theirs = torch.rand(6, num_steps, generator=g, dtype=torch.float64)  # mean of d^2 / (2 std^2)
    kl = theirs * dims / dt  # of steps whose variance is std^2 |dt|
    advantage = torch.randn(6, generator=g, dtype=torch.float64)
    ratio = ((log_prob - old) / dims).exp()[:, :9]
    a = advantage[:, None]
    surrogate = torch.maximum(-a * ratio, -a * ratio.clamp(1 - 1e-4, 1 + 1e-4))
    expected = surrogate.mean() + 0.04 * theirs[:, :9].mean()
    loss = preset.loss(log_prob, old, None, Scores(advantage), torch.zeros(6).long(), kl)
    assert_close(loss, expected)
    assert_close(torch.autograd.grad(loss, log_prob)[0], torch.autograd.grad(expected, log_prob)[0])
    numbers = preset.diagnostics(log_prob, old, None, Scores(advantage), torch.zeros(6).long())
    far = ((log_prob - old).abs() > 6.5536).double().mean().item()
    assert numbers["clip_fraction"] == pytest.approx(far) and far > 0


def test_pretrained_model_is_needed_for_the_kl_alone():
    assert not GRPO().needs_kl
    assert GRPO(beta_kl=0.1).needs_kl and not GRPO(beta_kl=0.1).needs_reference
    log_prob, old, _ = matrices(2, 2)
    with pytest.raises(ValueError, match="kl is None"):
        GRPO(beta_kl=0.1).loss(log_prob, old, None, Scores(torch.ones(2)), torch.zeros(2).long())


def test_order_of_rows_and_shift_of_rewards_change_nothing():
    log_prob, old, _ = matrices(6, 3, scale=0.2)
    groups = torch.tensor([0, 1, 0, 1, 0, 1])
    value = torch.randn(6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    order = torch.randperm(6, generator=torch.Generator().manual_seed(1))
    first = credit(GRPO(), value, groups).value
    assert_close(credit(GRPO(), value + 4 * groups - 9, groups).value, first)
    assert_close(credit(GRPO(), value[order], groups[order]).value, first[order])
    losses = [
        GRPO().loss(log_prob[at], old[at], None, Scores(first[at]), groups[at])
        for at in (torch.arange(6), order)
    ]
    assert_close(*losses)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"clip": 1.0}, "clip below 1"),
        ({"timestep_fraction": 1.5}, "timestep_fraction up to 1"),
        ({"timestep_fraction": 0.0}, "timestep_fraction above 0"),
        ({"beta_kl": -0.1}, "beta_kl from 0"),
        ({"std": "batch"}, "one of group, global, none, but 'batch' came"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        make_algorithm({"name": "grpo", **options})


def test_infinite_reward_is_refused():
    with pytest.raises(ValueError, match="GRPO compares rewards"):
        credit(GRPO(), torch.tensor([0.0, -math.inf]), torch.zeros(2).long())
