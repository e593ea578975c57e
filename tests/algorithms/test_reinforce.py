import math

import pytest
import torch
from algorithms.chains import LinearChain, credit, gradient, matrices, quadrature, train
from torch.testing import assert_close

from diffreward.algorithms import History, make_algorithm
from diffreward.algorithms.reinforce import REINFORCE
from diffreward.rewards import Scores


def chain_of_two():
    chain = LinearChain((0.9, 0.6), (0.1, 0.3), (0.5, 0.4))
    chain.shift.data = torch.tensor([0.31, -0.17], dtype=torch.float64)
    return chain


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("shared", [False, True])
def test_expected_gradient_is_the_policy_gradient(size, shared):
    chain = chain_of_two()
    trajectory, groups = quadrature(chain, size, shared=shared)
    for reward, slope in (
        (lambda x: 0.7 * x + 9, 0.7),
        (lambda x: -((x - 1.2) ** 2) / 2, 1.2 - chain.mean_end()),
    ):
        grad = gradient(REINFORCE(), chain, chain, trajectory, groups, reward)
        assert_close(grad, -slope * chain.tail[1:], rtol=1e-10, atol=1e-12)


def test_reaches_the_optimum_of_a_quadratic_reward():
    chain = train(
        REINFORCE(), LinearChain(), lambda x: -((x - 1.2) ** 2) / 2, iterations=150, prompts=16
    )
    assert_close(chain.mean_end().item(), 1.2, atol=0.08, rtol=0)


def test_advantages_are_over_the_others_of_the_prompt():
    value = torch.tensor([1.0, 10.0, 3.0, 20.0, 5.0])
    groups = torch.tensor([7, 2, 7, 2, 7])
    parts = {"member": value}
    credited = REINFORCE().credit(Scores(value, None, parts), groups, list("ababa"), History())
    assert_close(credited.value, torch.tensor([-3.0, -10.0, 0.0, 10.0, 3.0]).double())
    assert credited.parts is parts


def test_reward_shift_and_order_of_rows_change_nothing():
    log_prob, old, _ = matrices(6, 3)
    groups = torch.tensor([0, 1, 0, 1, 0, 1])
    value = torch.randn(6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    order = torch.randperm(6, generator=torch.Generator().manual_seed(1))
    first = credit(REINFORCE(), value, groups).value
    assert_close(credit(REINFORCE(), value + 4 * groups - 9, groups).value, first)
    assert_close(credit(REINFORCE(), value[order], groups[order]).value, first[order])
    losses = [
        REINFORCE().loss(log_prob[at], old[at], None, Scores(first[at]), groups[at])
        for at in (torch.arange(6), order)
    ]
    assert_close(*losses)


def test_diagnostics_and_registry():
    log_prob = torch.tensor([[0.5, -0.25]], dtype=torch.float64)
    zero, group = torch.zeros_like(log_prob), torch.zeros(1).long()
    numbers = make_algorithm("reinforce").diagnostics(
        log_prob, zero, None, Scores(torch.ones(1)), group
    )
    assert numbers == {"log_ratio_mean": 0.125, "log_ratio_max": 0.5}
    assert make_algorithm("reinforce") == REINFORCE()
    assert not REINFORCE().needs_reference and not REINFORCE().needs_kl


def test_bad_input_is_refused():
    with pytest.raises(ValueError, match="at least two"):
        credit(REINFORCE(), torch.zeros(3), torch.tensor([0, 0, 1]))
    with pytest.raises(ValueError, match="reward of sample 0 is nan"):
        credit(REINFORCE(), torch.tensor([math.nan, 0.0]), torch.zeros(2).long())
