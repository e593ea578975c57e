import math

import pytest
import torch
from algorithms.chains import (
    SIX,
    LinearChain,
    credit,
    draws,
    gradient,
    loss_of,
    matrices,
    quadrature,
    train,
)
from torch.testing import assert_close

from diffreward.algorithms import make_algorithm
from diffreward.algorithms.prdp import PRDP, from_mean_convention
from diffreward.algorithms.reinforce import REINFORCE
from diffreward.rewards import Scores

W, BETA = 0.7, 0.5
PLAIN = {"standardize": False, "passes": 1}
NO_CLIP = {**PLAIN, "clip": math.inf}


def linear(x):
    return W * x


def rewards(b, seed=0):
    return torch.randn(b, generator=torch.Generator().manual_seed(100 + seed), dtype=torch.float64)


def by_hand(log_prob, old, ref, value, groups, *, beta, clip, drop=False, weight=None):
    """The loss by its definition, over all ordered pairs, one at a time."""
    means = []
    for group in sorted(set(groups.tolist())):
        rows = (groups == group).nonzero()[:, 0].tolist()
        losses = []
        for a in rows:
            for b in rows:
                if a == b or (drop and value[a] == value[b]):
                    continue
                dr = (value[a] - value[b]) / beta
                free, near = 0.0, 0.0
                for t in range(log_prob.shape[1]):
                    for row, sign in ((a, 1), (b, -1)):
                        r, r_old = log_prob[row, t] - ref[row, t], old[row, t] - ref[row, t]
                        free = free + sign * r
                        near = near + sign * torch.minimum(
                            torch.maximum(r, r_old - clip), r_old + clip
                        )
                each = torch.maximum((free - dr) ** 2, (near - dr) ** 2)
                losses.append(each * (1.0 if weight is None else weight(a, b)))
        if losses:
            means.append(sum(losses) / len(losses))
        else:
            means.append(torch.zeros(()).to(log_prob))
    return sum(means) / len(means)


@pytest.mark.parametrize("clip", [0.3, 1.0, math.inf])
@pytest.mark.parametrize("ties", ["keep", "drop"])
def test_loss_and_gradient_are_those_of_the_definition(clip, ties):
    log_prob, old, ref = matrices(9, 3)
    groups = torch.tensor([4, 4, 4, -1, -1, -1, -1, 7, 7])
    value = rewards(9)
    value[1] = value[0]
    algorithm = PRDP(beta=0.8, clip=clip, ties=ties, **PLAIN)
    loss = algorithm.loss(log_prob, old, ref, Scores(value), groups)
    options = {"beta": 0.8, "clip": clip, "drop": ties == "drop"}
    expected = by_hand(log_prob, old, ref, value, groups, **options)
    assert_close(loss, expected)
    assert_close(torch.autograd.grad(loss, log_prob)[0], torch.autograd.grad(expected, log_prob)[0])


# The optimum --------------------------------------------------------------------------------


def test_reaches_the_linear_gaussian_optimum_to_three_decimals_with_shared_noise():
    algorithm = PRDP(beta=BETA, clip=0.2, shared_noise=True, standardize=False, passes=2)
    chain = train(algorithm, LinearChain(), linear, iterations=100)
    assert_close(chain.shift.detach(), chain.optimum(W, BETA), atol=5e-4, rtol=0)


def test_reaches_it_with_independent_noise_up_to_its_noise():
    algorithm = PRDP(beta=BETA, clip=0.2, standardize=False, passes=1, minibatches=2)
    chain = train(algorithm, LinearChain(), linear, iterations=200, lr=0.02)
    assert_close(chain.shift.detach(), chain.optimum(W, BETA), atol=0.015, rtol=0)


def test_standardised_beta_is_in_standard_deviations_of_the_reward():
    algorithm = PRDP(beta=BETA, clip=0.2, shared_noise=True, passes=2)
    chain = train(algorithm, LinearChain(), lambda x: 5 + 20 * W * x, iterations=100)
    # within a prompt x[T] has only the noise of the steps
    std = (chain.sigma * chain.tail[1:]).norm().item()
    assert_close(chain.shift.detach(), chain.optimum(1 / std, BETA), rtol=0.05, atol=0)


def test_loss_at_the_optimum_is_0_with_shared_noise_and_the_known_residual_without():
    chain, algorithm = LinearChain((0.9, 0.6), (0.1, 0.3), (0.5, 0.4)), PRDP(beta=BETA, **NO_CLIP)
    reference = chain.reference()
    chain.shift.data = chain.optimum(W, BETA)
    for shared, expected in ((True, 0.0), (False, 2 * (W * chain.tail[0].item() / BETA) ** 2)):
        trajectory, groups = quadrature(chain, 2, shared=shared)
        scores = Scores(linear(trajectory.final[:, 0]))
        loss = loss_of(algorithm, chain, reference, trajectory, groups, scores)
        assert_close(loss.item(), expected, atol=1e-12, rtol=1e-12)
        # and it is the minimum for on-policy steps
        assert torch.autograd.grad(loss, chain.shift)[0].abs().max() < 1e-12


def test_quadratic_reward_has_its_optimum_and_residual():
    mu0, sigma, m, rho, beta = 0.3, 0.6, 1.5, 0.8, 0.7
    chain = LinearChain((0.0,), (mu0,), (sigma,))
    reference, algorithm = chain.reference(), PRDP(beta=beta, **NO_CLIP)
    best = (m / rho + beta * mu0 / sigma**2) / (1 / rho + beta / sigma**2)
    chain.shift.data = torch.tensor([best - mu0], dtype=torch.float64)
    trajectory, groups = quadrature(chain, 2, SIX)
    scores = Scores(-((trajectory.final[:, 0] - m) ** 2) / (2 * rho))
    loss = loss_of(algorithm, chain, reference, trajectory, groups, scores)
    assert_close(loss.item(), sigma**4 / (rho * beta) ** 2, rtol=1e-12, atol=0)
    assert torch.autograd.grad(loss, chain.shift)[0].abs().item() < 1e-12


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("reward", ["linear", "quadratic"])
def test_expected_on_policy_gradient_is_minus_4_over_beta_that_of_the_objective(size, reward):
    chain = LinearChain((0.9, 0.6), (0.1, 0.3), (0.5, 0.4))
    reference = chain.reference()
    chain.shift.data = torch.tensor([0.31, -0.17], dtype=torch.float64)
    trajectory, groups = quadrature(chain, size)
    per_unit = chain.tail[1:]
    if reward == "linear":
        function, climb = linear, W * per_unit
    else:
        function = lambda x: -((x - 1.2) ** 2) / 2  # noqa: E731
        climb = (1.2 - chain.mean_end()) * per_unit
    objective = climb - BETA * chain.shift.detach() / chain.sigma**2
    # the clip is on: it does nothing on-policy
    algorithm = PRDP(beta=BETA, clip=1e-3, **PLAIN)
    grad = gradient(algorithm, chain, reference, trajectory, groups, function)
    assert_close(grad, -(4 / BETA) * objective, rtol=1e-10, atol=1e-12)


def test_offline_minimiser_is_biased_with_independent_noise_and_not_with_shared():
    gains = {}
    for shared in (True, False):
        chain = LinearChain((0.9, 0.6), (0.1, 0.3), (0.5, 0.4), gain=True)
        reference, algorithm = chain.reference(), PRDP(beta=BETA, **NO_CLIP)
        trajectory, groups = draws(chain, 256, 4, 0, shared=shared)  # of the pretrained model
        scores = Scores(linear(trajectory.final[:, 0]))
        options = {"max_iter": 200, "line_search_fn": "strong_wolfe", "tolerance_grad": 1e-10}
        data = (algorithm, chain, reference, trajectory, groups, scores)
        optimizer = torch.optim.LBFGS(chain.denoiser.parameters(), **options)

        def closure(optimizer=optimizer, data=data):
            optimizer.zero_grad()
            loss = loss_of(*data)
            loss.backward()
            return loss

        optimizer.step(closure)
        gains[shared] = chain.denoiser.gain.detach().abs().max().item()
        if shared:
            assert_close(chain.shift.detach(), chain.optimum(W, BETA), atol=1e-5, rtol=0)
    assert gains[True] < 1e-5
    assert gains[False] > 0.1


# The loss as a function ---------------------------------------------------------------------


def test_unclipped_loss_of_a_group_is_twice_the_variance_and_has_the_known_derivative():
    log_prob, old, ref = matrices(6, 4)
    value = rewards(6)
    algorithm = PRDP(beta=0.4, **NO_CLIP)
    loss = algorithm.loss(log_prob, old, ref, Scores(value), torch.zeros(6, dtype=torch.long))
    u = (log_prob - ref).sum(1).detach() - value / 0.4
    assert_close(loss.detach(), 2 * u.var())
    grad = torch.autograd.grad(loss, log_prob)[0]
    assert_close(grad, (4 * (u - u.mean()) / 5)[:, None].expand(6, 4))


def test_mean_convention_is_the_same_loss_in_other_units():
    dims, num_steps, beta, clip = 7, 4, 0.03, 0.2
    log_prob, old, ref = matrices(6, num_steps, scale=2.0)
    groups, value = torch.tensor([0, 0, 0, 1, 1, 1]), rewards(6)
    units = from_mean_convention(beta, clip, dims=dims, num_steps=num_steps)
    loss = PRDP(**units, **PLAIN).loss(log_prob, old, ref, Scores(value), groups)
    # the published loss: means over dimensions, clipped per step, then the mean over steps
    now, before = (log_prob - ref) / dims, (old - ref) / dims
    near = torch.minimum(torch.maximum(now, before - clip), before + clip).mean(1)
    now = now.mean(1)
    losses = []
    for g in (0, 1):
        at = groups == g
        error = value[at][:, None] - value[at]
        each = [((r[at][:, None] - r[at]) - error / beta) ** 2 for r in (now, near)]
        losses.append(torch.maximum(*each)[error > 0].mean())
    expected = sum(losses) / 2
    assert_close(loss, expected)
    assert_close(torch.autograd.grad(loss, log_prob)[0], torch.autograd.grad(expected, log_prob)[0])


def test_presets_are_the_published_numbers_in_nats():
    small, large, multi = (
        make_algorithm({"name": "prdp", "preset": f"paper_{name}"})
        for name in ("small", "large", "multi")
    )
    # Table 4, times D = 16384 and over D T = 819200
    assert [round(p.clip, 6) for p in (small, large, multi)] == [0.016384, 1.6384, 1.6384]
    for preset, beta in ((small, 3e-5), (large, 3e-6), (multi, 3e-5)):
        assert_close(preset.beta * 819_200, beta)
        assert_close(preset.scale, 819_200.0**-2)
        assert preset.ties == "drop" and not preset.standardize and not preset.shared_noise
    assert [p.passes for p in (small, large, multi)] == [10, 1, 1]
    assert [p.minibatches for p in (small, large, multi)] == [1, 1, 1]
    other = make_algorithm({"name": "prdp", "preset": "paper_large_minibatches"})
    assert (other.passes, other.minibatches, other.beta) == (1, 8, large.beta)
    assert make_algorithm({"name": "prdp", "preset": "fixed"}) == PRDP()


def test_clip_does_nothing_at_the_model_that_drew_the_samples():
    log_prob, _, ref = matrices(8, 3)
    groups, scores = torch.arange(8) // 4, Scores(rewards(8))
    grads = []
    for clip in (1e-9, 0.1, math.inf):
        algorithm = PRDP(beta=0.2, clip=clip, **PLAIN)
        loss = algorithm.loss(log_prob, log_prob.detach(), ref, scores, groups)
        grads.append(torch.autograd.grad(loss, log_prob)[0])
        assert algorithm.diagnostics(log_prob, log_prob, ref, scores, groups)["clip_fraction"] == 0
    assert torch.equal(grads[0], grads[2]) and torch.equal(grads[1], grads[2])


def test_clip_stops_what_has_gone_far_enough_and_not_what_comes_back():
    ref = torch.zeros(2, 1, dtype=torch.float64)
    groups, scores = torch.zeros(2, dtype=torch.long), Scores(torch.tensor([5.0, -5.0]))
    algorithm = PRDP(beta=1.0, clip=0.1, **PLAIN)
    # sample 0 is better by 10 nats. It has risen by 0.5 already: enough for one rollout
    gone = torch.tensor([[0.5], [-0.5]], dtype=torch.float64, requires_grad=True)
    loss = algorithm.loss(gone, ref, ref, scores, groups)
    assert torch.autograd.grad(loss, gone)[0].abs().max() == 0
    assert_close(loss.item(), (0.2 - 10.0) ** 2)
    # it has fallen: nothing holds it back from rising
    fallen = torch.tensor([[-0.5], [0.5]], dtype=torch.float64, requires_grad=True)
    loss = algorithm.loss(fallen, ref, ref, scores, groups)
    assert_close(torch.autograd.grad(loss, fallen)[0], torch.tensor([[-22.0], [22.0]]).double())


@pytest.mark.parametrize("ties", ["keep", "drop"])
def test_rewards_that_all_tie_give_no_nan(ties):
    log_prob, old, ref = matrices(6, 3)
    groups = torch.tensor([0, 0, 0, 1, 1, 2])  # and a group of one
    algorithm = PRDP(beta=1e-9, clip=0.1, ties=ties, passes=1)
    for value in (torch.full((6,), 0.1), torch.zeros(6)):
        credited = credit(algorithm, value, groups, torch.zeros(6))
        assert torch.equal(credited.value, value.double())
        loss = algorithm.loss(log_prob, old, ref, credited, groups)
        grad = torch.autograd.grad(loss, log_prob)[0]
        assert loss.isfinite() and grad.isfinite().all()
        if ties == "drop":
            assert loss == 0 and grad.abs().max() == 0
        else:
            assert loss > 0 and grad[-1].abs().max() == 0
        numbers = algorithm.diagnostics(log_prob, old, ref, credited, groups)
        assert all(math.isfinite(v) for v in numbers.values()) and "correlation" not in numbers


def test_tied_group_counts_as_nothing_among_others():
    log_prob, old, ref = matrices(6, 3)
    groups, value = torch.tensor([0, 0, 0, 1, 1, 1]), rewards(6)
    value[3:] = 0.25
    algorithm = PRDP(beta=0.3, clip=0.4, ties="drop", **PLAIN)
    both = algorithm.loss(log_prob, old, ref, Scores(value), groups)
    first = algorithm.loss(log_prob[:3], old[:3], ref[:3], Scores(value[:3]), groups[:3])
    assert_close(both, first / 2)


def test_float32_would_split_gradients_between_equal_squares():
    units = from_mean_convention(3e-5, 1e-6, dims=16384, num_steps=50)
    g = torch.Generator().manual_seed(0)
    now = (2 * units["clip"] * torch.randn(16, 50, generator=g)).requires_grad_()
    value = 0.28 + 0.01 * torch.randn(16, generator=g)
    zero, groups = torch.zeros(16, 50), torch.zeros(16, dtype=torch.long)
    a, b = torch.triu_indices(16, 16, 1)

    def maximum(dtype):
        r, dr = now.to(dtype), (value.to(dtype)[a] - value.to(dtype)[b]) / units["beta"]
        far = r.clamp(-units["clip"], units["clip"])
        free, near = ((v.sum(1)[a] - v.sum(1)[b] - dr) ** 2 for v in (r, far))
        share = (free == near).double().mean().item()
        return share, torch.autograd.grad(torch.maximum(free, near).mean(), now)[0].double()

    tied, truth = maximum(torch.float64)
    assert tied == 0
    tied, wrong = maximum(torch.float32)
    assert tied > 0.99
    assert (wrong - truth).norm() > 0.3 * truth.norm()
    loss = PRDP(beta=units["beta"], clip=units["clip"], **PLAIN).loss(
        now, zero, zero, Scores(value), groups
    )
    assert loss.dtype == torch.float64
    ours = torch.autograd.grad(loss, now)[0].double()
    assert (ours - truth).norm() < 1e-6 * truth.norm()


def test_float32_in_is_float64_inside():
    new, old, ref = (m.detach().float() for m in matrices(8, 5))
    value, groups = rewards(8).float(), torch.arange(8) // 4
    algorithm = PRDP(beta=1e-8, clip=0.1, **PLAIN)
    loss = algorithm.loss(new, old, ref, Scores(value), groups)
    doubles = (m.double() for m in (new, old, ref))
    assert_close(loss, algorithm.loss(*doubles, Scores(value.double()), groups), rtol=0, atol=0)


def test_with_small_beta_it_is_reinforce():
    log_prob, _, ref = matrices(12, 4)
    groups, value = torch.arange(12) // 4, rewards(12)
    grads = []
    for algorithm in (PRDP(beta=1e-7, clip=0.1, **PLAIN), REINFORCE()):
        credited = credit(algorithm, value, groups)
        loss = algorithm.loss(log_prob, log_prob.detach(), ref, credited, groups)
        grads.append(torch.autograd.grad(loss, log_prob)[0].flatten())
    assert torch.cosine_similarity(*grads, dim=0).item() > 1 - 1e-9


def test_rows_in_any_order_and_groups_of_any_name():
    log_prob, old, ref = matrices(10, 3)
    groups, value = torch.tensor([0, 0, 0, 0, 1, 1, 1, 2, 2, 2]), rewards(10)
    std = rewards(10, 1).abs()
    algorithm = PRDP(beta=0.3, clip=0.4, passes=1)

    def run(log_prob, old, ref, value, std, groups):
        leaf = log_prob.detach().requires_grad_()
        credited = credit(algorithm, value, groups, std)
        loss = algorithm.loss(leaf, old, ref, credited, groups)
        numbers = algorithm.diagnostics(leaf, old, ref, credited, groups)
        return loss, torch.autograd.grad(loss, leaf)[0], numbers

    loss, grad, numbers = run(log_prob, old, ref, value, std, groups)
    order = torch.randperm(10, generator=torch.Generator().manual_seed(3))
    names = torch.tensor([17, -4, 5])[groups]
    mixed = [m[order] for m in (log_prob, old, ref, value, std, names)]
    other, other_grad, other_numbers = run(*mixed)
    assert_close(other, loss)
    assert_close(other_grad, grad[order])
    assert other_numbers == pytest.approx(numbers)


def test_shift_of_the_rewards_of_a_prompt_changes_nothing():
    log_prob, old, ref = matrices(8, 3)
    groups, value = torch.arange(8) // 4, rewards(8)
    algorithm = PRDP(beta=0.3, clip=0.4, passes=1)
    losses = [
        algorithm.loss(log_prob, old, ref, credit(algorithm, v, groups), groups)
        for v in (value, value + 5.0, value + 3.0 * groups, 7.0 * value)
    ]
    for loss in losses[1:]:
        assert_close(loss, losses[0])


def test_two_groups_give_the_mean_of_their_losses():
    log_prob, old, ref = matrices(7, 3)
    groups, value = torch.tensor([0, 0, 0, 0, 1, 1, 1]), rewards(7)
    algorithm = PRDP(beta=0.3, clip=0.4, **PLAIN)
    parts = [
        algorithm.loss(log_prob[at], old[at], ref[at], Scores(value[at]), groups[at])
        for at in (groups == 0, groups == 1)
    ]
    both = algorithm.loss(log_prob, old, ref, Scores(value), groups)
    assert_close(both, (parts[0] + parts[1]) / 2)


# Uncertainty --------------------------------------------------------------------------------


@pytest.mark.parametrize("ties", ["keep", "drop"])
def test_pairs_weigh_by_their_uncertainty(ties):
    """1 / (V + s_a^2 + s_b^2), divided by its mean over the pairs that count."""
    log_prob, old, ref = matrices(7, 3)
    groups, value, std = torch.tensor([0, 0, 0, 0, 1, 1, 1]), rewards(7), rewards(7, 1).abs()
    value[5] = value[4]
    algorithm = PRDP(beta=0.3, clip=0.4, ties=ties, **PLAIN)
    pairs = [(a, b) for a in range(7) for b in range(a) if groups[a] == groups[b]]
    v = sum((value[a] - value[b]) ** 2 for a, b in pairs) / len(pairs)

    def weight(a, b):
        return 1 / (v + std[a] ** 2 + std[b] ** 2)

    counted = [p for p in pairs if ties == "keep" or value[p[0]] != value[p[1]]]
    mean = sum(weight(*p) for p in counted) / len(counted)
    expected = by_hand(
        *(log_prob, old, ref, value, groups),
        beta=0.3,
        clip=0.4,
        drop=ties == "drop",
        weight=lambda a, b: weight(a, b) / mean,
    )
    assert_close(algorithm.loss(log_prob, old, ref, Scores(value, std), groups), expected)


def test_uncertainty_that_all_share_changes_nothing_and_hopeless_samples_drop_out():
    log_prob, old, ref = matrices(6, 3)
    groups, value = torch.arange(6) // 3, rewards(6)
    algorithm = PRDP(beta=0.3, clip=0.4, **PLAIN)
    plain = algorithm.loss(log_prob, old, ref, Scores(value), groups)
    for std in (0.0, 1e-9, 0.7, 1e9, 1e200):
        scores = Scores(value, torch.full((6,), std, dtype=torch.float64))
        loss = algorithm.loss(log_prob, old, ref, scores, groups)
        assert_close(loss, plain, atol=1e-12, rtol=1e-12)
    tied = Scores(torch.ones(6), torch.ones(6))
    same = algorithm.loss(log_prob, old, ref, Scores(torch.ones(6)), groups)
    assert_close(algorithm.loss(log_prob, old, ref, tied, groups), same)
    off = PRDP(beta=0.3, clip=0.4, weigh_uncertainty=False, **PLAIN)
    std = rewards(6, 1).abs()
    assert torch.equal(off.loss(log_prob, old, ref, Scores(value, std), groups), plain)
    # one sample of which nothing is known: as if only the other pair were there
    std = torch.tensor([0, 0, 1e12], dtype=torch.float64)
    rows = [m[:3] for m in (log_prob, old, ref)]
    loss = algorithm.loss(*rows, Scores(value[:3], std), groups[:3])
    pair = algorithm.loss(*(m[:2] for m in rows), Scores(value[:2]), groups[:2])
    assert_close(loss, pair)


def test_weights_do_not_depend_on_the_unit_of_the_reward():
    log_prob, old, ref = matrices(6, 3)
    groups, value, std = torch.arange(6) // 3, rewards(6), rewards(6, 1).abs()
    algorithm = PRDP(beta=0.3, clip=0.4)
    losses = [
        algorithm.loss(log_prob, old, ref, credit(algorithm, c * value, groups, c * std), groups)
        for c in (1.0, 1000.0)
    ]
    assert_close(*losses)


# Credit, diagnostics, errors ----------------------------------------------------------------


def test_standardised_rewards_have_unit_variance_within_prompts():
    value = torch.tensor([1.0, 3.0, 101.0, 103.0])
    credited = credit(PRDP(), value, torch.tensor([0, 0, 1, 1]), torch.ones(4))
    # unbiased variance of {1, 3} is 2
    assert_close(credited.value, value.double() / math.sqrt(2))
    assert_close(credited.std, torch.ones(4).double() / math.sqrt(2))
    assert torch.equal(credit(PRDP(standardize=False), value, torch.zeros(4).long()).value, value)


def test_rounding_of_equal_rewards_is_not_blown_up():
    value = torch.full((6,), 0.1)
    value[0] = torch.nextafter(value[0], torch.tensor(1.0))
    credited = credit(PRDP(), value, torch.zeros(6).long())
    assert credited.value.std() < 1e-6


def test_diagnostics():
    ref = torch.zeros(4, 2, dtype=torch.float64)
    log_prob = torch.tensor([[1.0, 0.0], [0.0, 0.0], [0.5, -0.05], [0.0, 0.0]]).double()
    scores, groups = Scores(torch.tensor([2.0, 1.0, 7.0, 7.0])), torch.tensor([0, 0, 1, 1])
    numbers = PRDP(beta=1.0, clip=0.1).diagnostics(log_prob, ref, ref, scores, groups)
    expected = {
        "clip_fraction": 2 / 8,
        "log_ratio_mean": 1.45 / 8,
        "log_ratio_max": 1.0,
        "residual": math.sqrt(0.45**2 / 2),  # errors 1 - 1 and 0.45 - 0
        "correlation": 1.0 / math.hypot(1.0, 0.45),
    }
    assert numbers == pytest.approx(expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"beta": 0.0}, "PRDP needs beta above 0, but 0.0 came"),
        ({"clip": -1.0}, "clip above 0"),
        ({"beta": math.nan}, "beta above 0"),
        ({"passes": 0}, "passes above 0"),
        ({"minibatches": 0}, "minibatches above 0"),
        ({"ties": "dorp"}, "one of keep, drop, but 'dorp' came"),
        ({"bta": 1.0}, "did you mean 'beta'"),
        ({"preset": "paper_smal"}, "did you mean 'paper_small'"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        make_algorithm({"name": "prdp", **options})


def test_bad_input_is_refused():
    with pytest.raises(ValueError, match="reward of sample 1 is -inf"):
        credit(PRDP(), torch.tensor([0.0, -math.inf]), torch.zeros(2).long())
    log_prob, old, _ = matrices(2, 2)
    with pytest.raises(ValueError, match="log_prob_ref is None"):
        PRDP().loss(log_prob, old, None, Scores(torch.zeros(2)), torch.zeros(2).long())
