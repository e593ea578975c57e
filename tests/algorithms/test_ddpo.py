import collections
import math

import numpy as np
import pytest
import torch
from algorithms.chains import LinearChain, credit, gradient, matrices, quadrature, train
from torch.testing import assert_close

from diffreward.algorithms import History, make_algorithm
from diffreward.algorithms.ddpo import DDPO
from diffreward.rewards import Scores


def ppo(log_prob, old, advantage, clip, dims):
    """Row by row, step by step."""
    total = 0.0
    for row in range(log_prob.shape[0]):
        for t in range(log_prob.shape[1]):
            rho = ((log_prob[row, t] - old[row, t]) / dims).exp()
            a = advantage[row].item()
            if a > 0:
                total = total - a * (rho if rho < 1 + clip else 1 + clip)
            else:
                total = total - a * (rho if rho > 1 - clip else 1 - clip)
    return total / log_prob.numel()


@pytest.mark.parametrize(("clip", "dims", "scale"), [(0.2, 1, 0.3), (1e-4, 5000, 1.0)])
def test_loss_and_gradient_are_ppo(clip, dims, scale):
    log_prob, old, _ = matrices(8, 3, scale=scale)
    value = torch.randn(8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    loss = DDPO(clip=clip, dims=dims).loss(
        log_prob, old, None, Scores(value), torch.zeros(8).long()
    )
    expected = ppo(log_prob, old, value, clip, dims)
    assert_close(loss, expected)
    grad = torch.autograd.grad(loss, log_prob)[0]
    assert_close(grad, torch.autograd.grad(expected, log_prob)[0])
    assert 0 < (grad == 0).double().mean() < 1  # some, but not all, are clipped


def test_authors_clip_is_of_the_ratio_of_means():
    preset = make_algorithm({"name": "ddpo", "preset": "paper"})
    # 1e-4 of the ratio of means over 16384 dimensions: 1.64 nats of a step
    for nats, clipped in ((1.6383, 0.0), (1.6384, 1.0), (-1.6384, 0.0), (-1.6385, 1.0)):
        log_prob = torch.tensor([[nats]], dtype=torch.float64, requires_grad=True)
        zero, one = torch.zeros(1, 1, dtype=torch.float64), torch.zeros(1).long()
        scores = Scores(torch.tensor([math.copysign(1.0, nats)]))
        numbers = preset.diagnostics(log_prob, zero, None, scores, one)
        loss = preset.loss(log_prob, zero, None, scores, one)
        grad = torch.autograd.grad(loss, log_prob)[0].item()
        assert numbers["clip_fraction"] == clipped
        # within the limits the gradient is the advantage over D, up to 1e-4
        expected = 0.0 if clipped else -math.copysign(1.0, nats) / 16384
        assert grad == pytest.approx(expected, rel=2e-4, abs=0)
    assert (preset.buffer_size, preset.min_count, preset.advantage_clip) == (16, 16, 5.0)
    assert make_algorithm({"name": "ddpo", "preset": "prompt_agnostic"}).normalization == "batch"
    assert make_algorithm({"name": "ddpo", "preset": "aesthetic"}).buffer_size == 32


def test_expected_gradient_is_the_normalised_policy_gradient():
    chain = LinearChain((0.9, 0.6), (0.1, 0.3), (0.5, 0.4))
    chain.shift.data = torch.tensor([0.31, -0.17], dtype=torch.float64)
    trajectory, groups = quadrature(chain, 1)
    algorithm = DDPO(normalization="batch", advantage_clip=100.0)
    grad = gradient(algorithm, chain, chain, trajectory, groups, lambda x: 0.7 * x + 9)
    # std of w x[T], whose noise is x[0]'s and the steps'
    std = 0.7 * math.hypot(chain.tail[0], *(chain.sigma * chain.tail[1:]))
    expected = -0.7 * chain.tail[1:] / (std + 1e-6) / 2  # mean over the two steps
    assert_close(grad, expected, rtol=1e-10, atol=1e-12)


def test_reaches_the_optimum_of_a_quadratic_reward():
    algorithm = DDPO(normalization="batch", passes=2)
    chain = train(
        algorithm, LinearChain(), lambda x: -((x - 1.2) ** 2) / 2, iterations=100, prompts=16
    )
    assert_close(chain.mean_end().item(), 1.2, atol=0.08, rtol=0)


def test_prompt_statistics_are_those_of_a_tracker_with_a_buffer():
    rng = np.random.default_rng(0)
    algorithm = DDPO(buffer_size=6, min_count=5, advantage_clip=1.0)
    history, buffers = History(), collections.defaultdict(lambda: collections.deque(maxlen=6))
    from_prompt = []
    for _ in range(5):
        prompts = [f"prompt {p}" for p in rng.choice(4, 3, replace=False) for _ in range(2)]
        value = rng.normal(size=6) + 3 * np.arange(6)
        expected = np.empty(6)
        for prompt in set(prompts):
            rows = [r for r in range(6) if prompts[r] == prompt]
            buffers[prompt].extend(value[rows])
            enough = len(buffers[prompt]) >= 5
            from_prompt.append(enough)
            known = np.array(buffers[prompt]) if enough else value
            expected[rows] = (value[rows] - known.mean()) / (known.std() + 1e-6)
        scores = Scores(torch.tensor(value), torch.ones(6))
        groups = torch.arange(6) // 2
        credited = algorithm.credit(scores, groups, prompts, history)
        history.add(prompts, scores.value)
        assert_close(credited.value, torch.tensor(expected.clip(-1, 1)))
        assert credited.std is None
        agnostic = DDPO(normalization="batch", advantage_clip=100.0)
        flat = agnostic.credit(scores, groups, prompts, history).value
        assert_close(flat, torch.tensor((value - value.mean()) / (value.std() + 1e-6)))
    assert any(from_prompt) and not all(from_prompt)


def test_order_of_rows_changes_nothing():
    log_prob, old, _ = matrices(6, 3, scale=0.2)
    groups = torch.tensor([0, 1, 0, 1, 0, 1])
    value = torch.randn(6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    order = torch.randperm(6, generator=torch.Generator().manual_seed(1))
    algorithm = DDPO(buffer_size=3, min_count=3)
    first = credit(algorithm, value, groups).value
    assert_close(credit(algorithm, value[order], groups[order]).value, first[order])
    assert_close(credit(algorithm, value + 4 * groups - 9, groups).value, first)
    losses = [
        algorithm.loss(log_prob[at], old[at], None, Scores(first[at]), groups[at])
        for at in (torch.arange(6), order)
    ]
    assert_close(*losses)


def test_equal_rewards_teach_nothing():
    credited = credit(DDPO(), torch.full((4,), 0.1), torch.zeros(4).long())
    assert credited.value.abs().max() < 1e-6


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"clip": 0.0}, "DDPO needs clip above 0"),
        ({"clip": 1.5}, r"in \(0, 1\), but 1.5 came"),
        ({"dims": 0}, "dims above 0"),
        ({"buffer_size": 0}, "buffer_size above 0"),
        ({"normalization": "promt"}, "one of prompt, batch, but 'promt' came"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        make_algorithm({"name": "ddpo", **options})


def test_infinite_reward_is_refused():
    with pytest.raises(ValueError, match="DDPO compares rewards, but the reward of sample 1 is"):
        credit(DDPO(), torch.tensor([0.0, -math.inf]), torch.zeros(2).long())
