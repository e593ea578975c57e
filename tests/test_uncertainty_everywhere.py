"""What `Scores.std` does wherever it is used, and what it must never do; docs/uncertainty.md.

Of the five uses (pairs of PRDP, sets of DRAGON, advantages, pathwise gradients, steering) each has
its closed form here or, for PRDP, DRAGON and steering, in their own files; the invariants are here
for all. Toys of `algorithms/linear_chain.py` have known gradients.
"""

import inspect
import itertools
import math
import re
from pathlib import Path

import pytest
import torch
from algorithms.chains import credit, matrices
from algorithms.linear_chain import LinearChain, gradients, prompts, quadratic, scorer
from torch.testing import assert_close
from toys import ARChain

from diffreward.algorithms import make_algorithm
from diffreward.algorithms.base import certainty
from diffreward.config import SteeringConfig
from diffreward.rewards import Scores, as_reward, evaluate, make_reward
from diffreward.rewards.base import find_reward
from diffreward.rewards.combine import Aggregate
from diffreward.samples import Samples
from diffreward.steering import steer

PAGE = Path(__file__).parent.parent / "docs" / "uncertainty.md"
ADVANTAGES = [
    {"name": "grpo", "std": "group"},
    {"name": "grpo", "std": "global"},
    {"name": "grpo", "std": "none"},
    {"name": "ddpo"},
    {"name": "ddpo", "normalization": "batch"},
    {"name": "reinforce"},
]
PATHWISE = [
    {"name": "draft", "steps": None},
    {"name": "draft", "extra": 2},
    {"name": "alignprop"},
    {"name": "refl", "margin": None, "weight": 1.0},
    {"name": "refl", "margin": 2.0, "weight": 1.0},
    {"name": "drakes", "kl": 0.0, "steps": 2},
]
GROUPS = torch.arange(12) // 4


def ids(option):
    return "-".join(str(value) for value in option.values())


def normal(n, seed):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, generator=g, dtype=torch.float64)


def identical(function, count=3):
    """An ensemble of one opinion: std 0, with a graph."""
    return make_reward({"ensemble": [as_reward(function)] * count})


# Advantages ---------------------------------------------------------------------------------


def test_certainty_is_the_relative_precision():
    std = torch.tensor([0.0, 0.5, 1.0, 2.0, 1e300])
    found = certainty(Scores(torch.zeros(5), std), 0.5)
    weight = torch.tensor([1.0, 1 / 2, 1 / 5, 1 / 17, 0.0]).double()
    assert_close(found, weight / weight.mean())
    for nothing in (certainty(Scores(std), 0.5), certainty(Scores(std, std), None)):
        assert torch.equal(nothing, torch.ones(5).double())


@pytest.mark.parametrize("options", ADVANTAGES, ids=ids)
def test_advantages_are_weighted_after_centring_and_before_the_limit(options):
    value, std, tau = normal(12, 0), normal(12, 1).abs(), 0.4
    plain = credit(make_algorithm(options), value, GROUPS).value
    found = credit(make_algorithm({**options, "uncertainty": tau}), value, GROUPS, std).value
    weight = tau**2 / (tau**2 + std**2)
    expected = weight / weight.mean() * plain
    assert_close(found, expected)
    if options["name"] != "reinforce":
        limited = make_algorithm({**options, "uncertainty": tau, "advantage_clip": 0.3})
        found = credit(limited, value, GROUPS, std).value
        assert_close(found, expected.clamp(-0.3, 0.3))
        assert (expected.abs() > 0.3).any()


@pytest.mark.parametrize("options", ADVANTAGES, ids=ids)
@pytest.mark.parametrize("std", [0.1, 3.0])
def test_uncertainty_that_all_share_changes_no_advantage(options, std):
    value = normal(12, 0)
    plain = credit(make_algorithm(options), value, GROUPS).value
    shared = torch.full((12,), std, dtype=torch.float64)
    found = credit(make_algorithm({**options, "uncertainty": 0.5}), value, GROUPS, shared).value
    assert_close(found, plain, rtol=1e-12, atol=0)


# Pathwise -----------------------------------------------------------------------------------

RHO, KAPPA = 0.3, 1.7


def spread(samples):
    """r = -|x - c|^2 / 2 with std rho |x - c|^2: the lower bound is (1 + 2 kappa rho) r."""
    r = evaluate(quadratic(), samples).value
    return Scores(r, -2 * RHO * r)


@pytest.mark.parametrize("options", PATHWISE, ids=ids)
def test_lower_bound_is_climbed_with_the_gradient_of_both(options):
    names, policy = prompts(3), LinearChain(1.0)
    plain, losses = gradients(make_algorithm(options), policy, names, scorer(as_reward(spread)))
    cautious = make_algorithm({**options, "kappa": KAPPA})
    found, lower = gradients(cautious, policy, names, scorer(as_reward(spread)))
    assert plain.abs().max() > 0.1
    factor = 1 + 2 * KAPPA * RHO
    assert_close(found, factor * plain, rtol=1e-5, atol=1e-6)
    margin = options.get("margin") or 0.0
    assert_close(lower - margin, factor * (losses - margin), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("options", PATHWISE, ids=ids)
def test_what_is_logged_is_the_reward(options):
    policy, names = LinearChain(1.0), prompts(3)
    logged = []
    for kappa in (0.0, KAPPA):
        algorithm = make_algorithm({**options, "kappa": kappa})
        *_, scores = algorithm.loss(
            policy,
            policy.encode(names),
            torch.Generator().manual_seed(0),
            scorer(as_reward(spread)),
        )
        logged.append(scores)
    assert torch.equal(logged[0].value, logged[1].value)
    assert torch.equal(logged[0].std, logged[1].std) and not logged[1].std.requires_grad


def test_lower_bounds_need_a_std_with_a_gradient():
    policy = LinearChain(1.0)
    condition = policy.encode(prompts(2))
    detached = lambda s: Scores(evaluate(quadratic(), s).value, torch.ones(len(s)))  # noqa: E731
    for reward, message in ((quadratic(), "have none"), (as_reward(detached), "without a grad")):
        for options in PATHWISE:
            algorithm = make_algorithm({**options, "kappa": 0.5})
            with pytest.raises(ValueError, match=f"kappa=0.5 .*{message}"):
                algorithm.loss(policy, condition, None, scorer(reward))


# Invariants ---------------------------------------------------------------------------------


def test_identical_members_change_nothing():
    """In none of the five, bit for bit, with the option on."""
    x = normal(12, 3)[:, None]
    samples = Samples(x, "toy", [""] * 12)
    reward = identical(lambda s: s.data[:, 0] ** 3 - 7)
    scores = evaluate(reward, samples)
    value, std = scores.value.double(), scores.std.double()
    assert torch.equal(std, torch.zeros(12).double()) and torch.equal(scores.value, value.float())

    for options in ADVANTAGES:  # 1
        plain = credit(make_algorithm(options), value, GROUPS)
        found = credit(make_algorithm({**options, "uncertainty": 0.2}), value, GROUPS, std)
        assert torch.equal(found.value, plain.value)

    log_prob, old, ref = matrices(12, 3)  # 2
    prdp = make_algorithm("prdp")
    plain, found = (
        prdp.loss(log_prob, old, ref, credit(prdp, value, GROUPS, s), GROUPS) for s in (None, std)
    )
    assert torch.equal(found, plain)

    for builder in ("winners", "top"):  # 3
        plain = credit(make_algorithm({"name": "dragon", "builder": builder}), value, GROUPS)
        for independent in (False, True):
            options = {"name": "dragon", "builder": builder, "bound": 3.0}
            dragon = make_algorithm({**options, "independent": independent})
            found = credit(dragon, value, GROUPS, std)
            assert torch.equal(found.value, plain.value)
            assert torch.equal(found.parts["pair"], plain.parts["pair"])

    names, policy = prompts(3), LinearChain(1.0)  # 4
    score = scorer(identical(lambda s: evaluate(quadratic(), s).value))
    for options in PATHWISE:
        plain = gradients(make_algorithm(options), policy, names, score)
        found = gradients(make_algorithm({**options, "kappa": 2.0}), policy, names, score)
        for a, b in zip(found, plain, strict=True):
            assert torch.equal(a, b)

    shared = dict(num_particles=4, lmbda=1.0, schedule=1, ess_threshold=None, progress=False)
    plain = steer(ARChain(), reward, ["", "1"], **shared)  # 5
    for mode in ("terminal", "intermediate"):
        found = steer(ARChain(), reward, ["", "1"], uncertainty=mode, kappa=2.0, **shared)
        assert torch.equal(found.particles.data, plain.particles.data)
        assert torch.equal(found.log_weights, plain.log_weights)


def test_unknown_uncertainty_counts_as_none_in_weights():
    value = normal(12, 0)
    for options in [*ADVANTAGES, {"name": "dragon"}]:
        option = {"bound": 2.0} if options["name"] == "dragon" else {"uncertainty": 0.1}
        plain = credit(make_algorithm(options), value, GROUPS).value
        assert torch.equal(credit(make_algorithm(options | option), value, GROUPS).value, plain)


@pytest.mark.parametrize("seed", range(5))
def test_uncertainty_never_pays(seed):
    """All rewards are negative, and one sample becomes more uncertain: nowhere does it gain.

    A reward times exp(-std) would rise. A centred one falls in size and keeps its sign, so that the
    sample comes nearer to the average, and not past it.
    """
    value, base = normal(12, seed) - 10, normal(12, seed + 50).abs()
    assert (value < 0).all()
    stds = [base.clone() for _ in range(4)]
    for std, one in zip(stds, (0.0, 0.3, 1.0, 30.0), strict=True):
        std[5] = one

    for options in ADVANTAGES:
        algorithm = make_algorithm({**options, "uncertainty": 0.5})
        found = [credit(algorithm, value, GROUPS, std).value for std in stds]
        assert all(torch.equal(f.sign(), found[0].sign()) for f in found)
        size = torch.stack([f[5].abs() for f in found])
        assert (size.diff() < 0).all() and size[-1] < 0.01 * size[0]

    log_prob, old, ref = matrices(12, 3, scale=0.0)  # at the pretrained model: all r_hat are 0
    groups = torch.arange(12) // 2
    prdp, pushes = make_algorithm({"name": "prdp", "standardize": False}), []
    for std in stds:
        loss = prdp.loss(log_prob, old, ref, Scores(value, std), groups)
        pushes.append(torch.autograd.grad(loss, log_prob)[0].sum(1))
    pair, others = [4, 5], [0, 1, 2, 3, 6, 7, 8, 9, 10, 11]
    for less, more in itertools.pairwise(pushes):
        assert (more.sign() == less.sign()).all()
        assert (more[pair].abs() < less[pair].abs()).all()
        assert (more[others].abs() > less[others].abs()).all()  # the mean weight stays

    best = value.clone()
    best[5] = value.max() + 1
    for builder in ("winners", "top"):
        for independent in (False, True):
            options = {"name": "dragon", "builder": builder, "independent": independent}
            dragon = make_algorithm({**options, "bound": 0.4})
            won = torch.stack([credit(dragon, best, GROUPS, std).value[5] for std in stds]) == 1
            # once lost, never won again
            assert won[0] and not won[-1] and (won.int().diff() <= 0).all()

    for how in Aggregate.NAMES:  # of opinions that part, with the same mean
        aggregate = Aggregate(how, beta=0.3, lam=0.2, kappa=0.4)
        apart = torch.tensor([-1.0, 0.2, 0.8])[:, None].double()
        lower = torch.stack([aggregate(value + s * apart)[0] for s in (0.0, 0.3, 1.0, 4.0)])
        assert (lower.diff(dim=0) < 1e-6).all()

    x = value[:, None]
    for std in stds:  # what is climbed, and steered by
        reward = as_reward(lambda s, std=std: Scores(s.data[:, 0], std + 0 * s.data[:, 0]))
        climbed, _, _ = make_algorithm({"name": "draft", "kappa": 0.5}).judge(
            ARChain(), x.requires_grad_(), ARChain().encode([""] * 12), scorer(reward)
        )
        assert_close(climbed, (value - 0.5 * std).float())


@pytest.mark.parametrize("seed", range(3))
def test_a_constant_added_to_all_rewards_changes_nothing(seed):
    """So that it cannot matter whether they are negative."""
    value, std = normal(12, seed), normal(12, seed + 9).abs()
    for options in ADVANTAGES:
        algorithm = make_algorithm({**options, "uncertainty": 0.5})
        found = [credit(algorithm, value + c, GROUPS, std).value for c in (0.0, -50.0)]
        assert_close(*found, rtol=1e-9, atol=1e-9)
    log_prob, old, ref = matrices(12, 3)
    prdp, dragon = (make_algorithm(spec) for spec in ("prdp", {"name": "dragon", "bound": 0.5}))
    losses = [
        prdp.loss(log_prob, old, ref, credit(prdp, value + c, GROUPS, std), GROUPS)
        for c in (0.0, -50.0)
    ]
    assert_close(*losses)
    labels = [credit(dragon, value + c, GROUPS, std).value for c in (0.0, -50.0)]
    assert torch.equal(*labels)


def test_softmin_lies_between_min_and_mean():
    values = normal(4 * 500, 1).view(4, 500) * 5 - 3  # of either sign
    last = values.amin(0)
    for beta in (1e-3, 0.1, 1.0, 10.0, 1e4):
        found, _ = Aggregate("softmin", beta=beta)(values)
        assert (found >= last - 1e-9).all() and (found <= values.mean(0) + 1e-9).all()
        last = found
    assert_close(Aggregate("softmin", beta=1e-3)(values)[0], values.amin(0), atol=2e-3, rtol=0)
    assert_close(last, values.mean(0), atol=1e-2, rtol=0)


def test_weights_have_no_gradient():
    value, std = normal(12, 0), normal(12, 1).abs().requires_grad_()
    for options in ADVANTAGES:
        found = credit(make_algorithm({**options, "uncertainty": 0.5}), value, GROUPS, std)
        assert not found.value.requires_grad
    log_prob, old, ref = matrices(12, 3)
    loss = make_algorithm("prdp").loss(log_prob, old, ref, Scores(value, std), GROUPS)
    assert torch.autograd.grad(loss, std, allow_unused=True) == (None,)


# Options ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["grpo", "ddpo", "reinforce"])
@pytest.mark.parametrize("tau", [0.0, -1.0, math.inf, math.nan])
def test_tau_out_of_range(name, tau):
    with pytest.raises(ValueError, match=r"uncertainty of \w+ is the std at which a sample counts"):
        make_algorithm({"name": name, "uncertainty": tau})


@pytest.mark.parametrize("name", ["draft", "alignprop", "refl", "drakes"])
@pytest.mark.parametrize("kappa", [-0.1, math.inf, math.nan])
def test_kappa_out_of_range(name, kappa):
    with pytest.raises(ValueError, match=r"kappa of \w+ is 0 or more, and finite"):
        make_algorithm({"name": name, "kappa": kappa})


def test_table_of_the_documentation_has_the_options_and_their_defaults():
    rows = re.findall(r"^\| (`.+?`) \| .+? \| (`\w+`.*?) \| (.+?) \|", PAGE.read_text(), re.M)
    shown = set()
    for where, option, default in rows:
        names, defaults = re.findall(r"`(\w+)`", option), default.split(", ")
        for owner in re.findall(r"`(\w+)`", where):
            if owner == "uncertain":
                known = inspect.signature(find_reward(owner).factory).parameters
                known = {name: parameter.default for name, parameter in known.items()}
            else:
                known = vars(SteeringConfig() if owner == "steer" else make_algorithm(owner))
            for name, value in zip(names, defaults, strict=True):
                assert str(known[name]).lower() == value.replace("null", "none"), (owner, name)
                shown.add((owner, name))
    pathwise = {(name, "kappa") for name in ("draft", "alignprop", "refl", "drakes")}
    advantages = {(name, "uncertainty") for name in ("grpo", "ddpo", "reinforce")}
    assert shown == pathwise | advantages | {
        ("uncertain", "aggregate"),
        ("prdp", "weigh_uncertainty"),
        ("dragon", "bound"),
        ("dragon", "independent"),
        ("steer", "uncertainty"),
        ("steer", "kappa"),
    }
