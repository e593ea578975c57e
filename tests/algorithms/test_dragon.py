"""DRAGON: how D+ and D- are made, against brute force and closed forms, and what training does."""

import itertools
import math

import numpy as np
import pytest
import torch

from diffreward.algorithms import History
from diffreward.algorithms.dpo import diffusion_dpo, diffusion_kto
from diffreward.algorithms.dragon import DRAGON, halves, swap_sets
from diffreward.rewards import RewardInfo, Scores, SetReward, SetScores, score_set

INF = math.inf


class Of(SetReward):
    """Any function of a set's features, ``(n, d) -> ()``."""

    info = RewardInfo("of", of_sets=True)

    def __init__(self, function, min_samples=1):
        self.function, self.min_samples, self.calls = function, min_samples, 0

    def features(self, samples):
        return samples.data

    def value(self, features):
        self.calls += 1
        return self.function(features)


def mean(x):
    return x.mean()


def frechet(mu=0.0, sigma=1.0):
    """Minus the distance of the Gaussian of a set of numbers to N(mu, sigma^2)."""
    return lambda x: -((x.mean() - mu) ** 2 + (x.std(correction=0) - sigma) ** 2)


def largest_gap(x):  # no mean of anything
    return x.flatten().sort().values.diff().max() - 0.1 * x.pow(2).sum()


def interactions(x):
    return torch.sin(3 * x @ x.T).sum() / len(x) + x.prod(0).sum()


FUNCTIONS = {"frechet": frechet(0.5, 0.3), "gap": largest_gap, "interactions": interactions}


def draw(n, seed=0, d=1):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, d, generator=g, dtype=torch.float64)


def of_sets(reward, x):
    """Without influences, which cost an evaluation each."""
    return SetScores(torch.zeros(len(x)), features=x, total=0.0, reward=reward)


def credit(algorithm, scores, groups=None):
    groups = torch.zeros(len(scores), dtype=torch.long) if groups is None else groups
    return algorithm.credit(scores, groups, [""] * len(groups), History())


def single(*rewards, std=None):
    rewards = torch.tensor(rewards, dtype=torch.float64)
    return Scores(rewards, None if std is None else torch.tensor(std, dtype=torch.float64))


# -- D1, D2 and pairs ---------------------------------------------------------------------------


def test_halves_of_interleaved_groups():
    first, second = halves(torch.tensor([5, 1, 5, 1, 5, 5, 9, 9]))
    assert first.tolist() == [1, 0, 2, 6] and second.tolist() == [3, 4, 5, 7]
    with pytest.raises(ValueError, match="a prompt has 3; make samples_per_prompt even"):
        halves(torch.tensor([0, 0, 1, 1, 1]))


def test_the_better_of_each_pair_wins():
    groups = torch.tensor([0, 1, 0, 0, 1, 0])  # pairs 0-3, 2-5 and 1-4
    got = credit(DRAGON(), single(1.0, 2.0, 5.0, 3.0, 2.0, 4.0), groups)
    assert got.value.tolist() == [-1, 0, 1, 1, 0, -1]
    pair = got.parts["pair"].tolist()
    assert pair[0] == pair[3] != pair[2] == pair[5] and pair[1] == pair[4] == -1
    assert {pair[0], pair[2]} == {0, 1}


def test_a_hard_constraint_that_is_not_met_loses():
    got = credit(DRAGON(bound=2.0), single(-INF, -INF, 0.0, -INF, std=[0.1] * 4))
    assert got.value.tolist() == [-1, 0, 1, 0]
    top = credit(DRAGON(builder="top"), single(-INF, 1.0, -INF, -INF))
    assert top.value.tolist() == [-1, 1, 0, 0]


def test_a_bound_drops_pairs_that_may_be_the_other_way_round():
    value, std = (1.0, 1.0, 1.0, 2.0, 4.0, 0.0), [0.5, 0.5, 0.2, 0.5, 0.5, 0.2]
    scores = single(*value, std=std)  # pairs 0-3, 1-4, 2-5; gaps 1, 3, 1, sums of std 1, 1, 0.4
    assert credit(DRAGON(bound=0.9), scores).value.tolist() == [-1, -1, 1, 1, 1, -1]
    assert credit(DRAGON(bound=1.1), scores).value.tolist() == [0, -1, 1, 0, 1, -1]
    assert credit(DRAGON(bound=2.6), scores).value.tolist() == [0, -1, 0, 0, 1, 0]
    with pytest.warns(UserWarning, match="by bound=4.0 standard deviations"):
        assert not credit(DRAGON(bound=4.0), scores).value.any()
    # no standard deviations, nothing to bound
    assert credit(DRAGON(bound=9.0), single(*value)).value.tolist() == [-1, -1, 1, 1, 1, -1]


def test_a_bound_for_independent_errors():
    """Pairs with |dr| <= k sqrt(s_a^2 + s_b^2) are dropped, no others."""
    value, std = (1.0, 0.0, 6.0, 0.0), [0.3, 3.0, 0.4, 4.0]  # pairs: dr 5 and 0, std 0.5 and 5
    scores = single(*value, std=std)
    assert credit(DRAGON(bound=9.9, independent=True), scores).value.tolist() == [-1, 0, 1, 0]
    # 10 * 0.5 is the difference, which 10 * (0.3 + 0.4) is above
    for bound, independent in ((10.1, True), (7.2, False)):
        with pytest.warns(UserWarning, match="nothing is preferred"):
            assert not credit(DRAGON(bound=bound, independent=independent), scores).value.any()
    assert credit(DRAGON(bound=7.1), scores).value.tolist() == [-1, 0, 1, 0]
    rows = single(0.0, 5.0, 2.5, 2.5, std=[0.3, 0.4, 5.0, 5.0])
    top = {"builder": "top", "bound": 9.9, "share": 0.25}
    assert credit(DRAGON(**top, independent=True), rows).value.tolist() == [-1, 1, 0, 0]
    with pytest.warns(UserWarning, match="nothing is preferred"):
        assert not credit(DRAGON(**top), rows).value.any()
    assert credit(DRAGON(independent=True), single(1.0, 2.0, std=[9.0, 9.0])).value[1] == 1


def test_nothing_is_learnt_from_ties():
    with pytest.warns(UserWarning, match="nothing is preferred in this rollout"):
        scores = credit(DRAGON(), single(1.0, 2.0, 1.0, 2.0))
    assert scores.value.tolist() == [0, 0, 0, 0] and (scores.parts["pair"] == -1).all()
    for algorithm in (DRAGON(), DRAGON(objective="kto")):
        e = torch.ones(4, 1, dtype=torch.float64, requires_grad=True)
        groups = torch.zeros(4, dtype=torch.long)
        loss = algorithm.loss(e, torch.zeros_like(e), scores, groups)
        loss.backward()
        assert loss == 0 and (e.grad == 0).all()
        assert algorithm.diagnostics(e, torch.zeros_like(e), scores, groups) == {"labelled": 0}


def test_top_of_each_prompt_and_of_all():
    groups = torch.tensor([0, 0, 0, 1, 1, 1, 1, 1])
    scores = single(1.0, 3.0, 2.0, 14.0, 11.0, 15.0, 12.0, 13.0)
    got = credit(DRAGON(builder="top", share=0.4), scores, groups)
    assert got.value.tolist() == [-1, 1, 0, 1, -1, 1, -1, 0]
    pair = got.parts["pair"]
    assert pair[5] == pair[4] and pair[3] == pair[6]  # best with worst
    across = DRAGON(builder="top", share=0.25, objective="kto", paired=False)
    assert credit(across, scores, groups).value.tolist() == [-1, 0, -1, 1, 0, 1, 0, 0]


def test_top_with_a_bound_sorts_by_the_bounds():
    scores = single(5.0, 4.0, 1.0, 0.0, std=[3.0, 0.1, 0.1, 5.0])
    got = credit(DRAGON(builder="top", bound=1.0, share=0.25), scores)
    assert got.value.tolist() == [0, 1, -1, 0]  # not 5 +- 3, not 0 +- 5


def test_unpaired_samples_are_compared_across_prompts():
    """Prompt 0 has the lower rewards: across prompts it loses as often as chance has it."""
    groups = torch.arange(40).repeat_interleave(2) % 2
    rewards = single(*(100.0 * g + j for j, g in enumerate(groups.tolist())))
    algorithm = DRAGON(objective="kto", paired=False, seed=3)
    label = credit(algorithm, rewards, groups).value
    assert (label == 1).sum() == (label == -1).sum() == 40
    assert label[groups == 0].sum() < -10 and label[groups == 1].sum() > 10
    within = credit(DRAGON(), rewards, groups).value
    assert within[groups == 0].sum() == within[groups == 1].sum() == 0
    again = credit(algorithm, rewards, groups).value
    assert torch.equal(label, again)
    assert not torch.equal(
        label, credit(DRAGON(objective="kto", paired=False), rewards, groups).value
    )


# -- swaps --------------------------------------------------------------------------------------


def brute(function, x, first, second):
    """The best value over all divisions of the pairs."""
    return max(
        function(x[torch.where(torch.tensor(choice), first, second)]).item()
        for choice in itertools.product([True, False], repeat=len(first))
    )


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("seed", range(6))
def test_swaps_never_lower_the_value_and_keep_all_samples(name, seed):
    function, n = FUNCTIONS[name], 6
    x = draw(2 * n, seed, d=2 if name == "interactions" else 1)
    first, second = torch.arange(n), torch.arange(n, 2 * n)
    seen = []

    def value(rows):
        seen.append(function(x[rows]).item())
        return seen[-1]

    previous = -INF
    for sweeps in (1, 2, 20):
        seen.clear()
        found = swap_sets(value, first, second, sweeps=sweeps)
        assert found.before == (function(x[:n]).item(), function(x[n:]).item())
        assert found.value >= max(*found.before, previous)
        assert found.value == function(x[found.plus]).item() <= brute(function, x, first, second)
        assert len(seen) <= 2 + n * sweeps and (sweeps > 1 or len(seen) == 2 + n)
        # one of each pair on each side, partners beside each other
        assert (found.plus % n).tolist() == (found.minus % n).tolist() == list(range(n))
        assert ((found.plus - found.minus).abs() == n).all()
        previous = found.value
    for j in range(n):  # a local optimum
        other = found.plus.clone()
        other[j] = found.minus[j]
        assert function(x[other]).item() <= found.value


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("order", ["fixed", "random"])
@pytest.mark.parametrize("start", ["better", "first"])
def test_of_a_linear_reward_swaps_find_the_winners(seed, order, start):
    x, groups = draw(24, seed), torch.arange(3).repeat(8)
    x[4] = x[4 + 12]  # a tie: rows 4 and 16 are samples 1 and 5 of prompt 1
    swaps = DRAGON(order=order, start=start, seed=seed)
    by_sets = credit(swaps, of_sets(Of(mean), x), groups)
    one_by_one = credit(DRAGON(), Scores(x[:, 0]), groups)
    assert by_sets.value[4] == by_sets.value[16] == 0
    assert torch.equal(by_sets.value, one_by_one.value)
    by_influence = credit(DRAGON(builder="influence"), score_set(Of(mean), x), groups)
    assert torch.equal(by_influence.value, one_by_one.value)


def test_which_set_a_sweep_starts_from():
    """Only if the three others are positive does exchanging count: a start decides all."""
    x = torch.tensor([1.0, 1.0, 1.0, -1.0, -1.0, -1.0])
    first, second = torch.arange(3, 6), torch.arange(3)  # D1 is the worse

    def value(rows):
        s = x[rows].sum().item()
        return {3.0: 2.0, -3.0: 1.0}.get(s, 0.0)  # mixed sets are worst

    better = swap_sets(value, first, second)
    assert better.plus.tolist() == [0, 1, 2] and better.value == 2
    as_it_is = swap_sets(value, first, second, start="first")
    assert as_it_is.plus.tolist() == [3, 4, 5] and as_it_is.value == 1
    assert as_it_is.before == better.before == (1.0, 2.0)


def test_the_order_is_drawn_from_the_seed_and_anew_in_each_iteration():
    x = draw(16, 1, d=2)
    reward = Of(interactions)

    def labels(algorithm):
        return credit(algorithm, of_sets(reward, x)).value.tolist()

    one = DRAGON(order="random", seed=1)
    assert labels(one) == labels(DRAGON(order="random", seed=1))
    found = {tuple(labels(DRAGON(order="random", seed=seed))) for seed in range(8)}
    assert len(found) > 1
    seeds = [one.at(k / 100).seed for k in range(100)]
    assert len(set(seeds)) == 100 and seeds == [one.at(k / 100).seed for k in range(100)]
    assert one.at(0.25).seed != DRAGON(order="random", seed=2).at(0.25).seed
    assert len({tuple(labels(one.at(k / 10))) for k in range(8)}) > 1
    assert labels(DRAGON(seed=1)) == labels(DRAGON(seed=2))  # fixed


@pytest.mark.parametrize("seed", range(3))
def test_frechet_distance_of_256_samples(seed):
    """One sweep makes D+ closer to the target than both sets were, and D- farther."""
    x = draw(512, seed) * 1.7 + 2.0
    value = frechet()
    found = credit(DRAGON(), of_sets(Of(value), x))
    sets = value(x[:256]).item(), value(x[256:]).item()
    plus, minus = value(x[found.value == 1]).item(), value(x[found.value == -1]).item()
    assert (found.value != 0).all()
    assert minus < min(sets) <= max(sets) < plus
    assert -plus < 0.6 * -max(sets)  # the pairs' better halves: mean 2 - 1.7 / sqrt(pi)
    assert found.parts["set_value"][0].item() == pytest.approx(plus)
    assert found.parts["set_gain"][0].item() == pytest.approx(plus - max(sets))


def test_evaluations_of_a_sweep():
    reward = Of(frechet())
    credit(DRAGON(), of_sets(reward, draw(32)))
    assert reward.calls == 16 + 2


def test_pairs_that_make_no_difference_are_dropped():
    """The value is the number of distinct values: duplicates within a pair change nothing."""
    x = torch.tensor([[0.0], [1.0], [2.0], [0.0], [0.0], [2.0]])  # pairs 0-0, 1-0, 2-2
    found = credit(DRAGON(), of_sets(Of(lambda x: x.unique().numel() * torch.ones(())), x))
    assert found.value.tolist() == [0, 1, 0, 0, -1, 0]
    flat = Of(lambda x: torch.ones(()))
    with pytest.warns(UserWarning, match="nothing is preferred"):
        credit(DRAGON(sweeps=50), of_sets(flat, x))
    assert flat.calls == 3 + 2  # nothing was exchanged, so one sweep was enough


# -- the loss -----------------------------------------------------------------------------------


def test_losses_are_those_of_the_labels_in_every_minibatch():
    g = torch.Generator().manual_seed(0)
    groups = torch.arange(6).repeat_interleave(4)
    scores = credit(DRAGON(), Scores(torch.randn(24, generator=g)), groups)
    e, ref = torch.rand(2, 24, 2, generator=g, dtype=torch.float64)
    winners, losers = [], []
    for group in range(6):
        for j in range(2):
            a, b = 4 * group + j, 4 * group + j + 2
            winners.append(a if scores.value[a] > 0 else b)
            losers.append(b if scores.value[a] > 0 else a)
    each = diffusion_dpo(e, ref, torch.tensor(winners), torch.tensor(losers), 3.0)
    algorithm = DRAGON(beta=3.0)
    torch.testing.assert_close(algorithm.loss(e, ref, scores, groups), each.mean())
    rows = torch.arange(8, 24)
    part = algorithm.loss(e[rows], ref[rows], scores.take(rows), groups[rows])
    torch.testing.assert_close(part, each[4:].mean())

    kto = DRAGON(objective="kto", beta=3.0, undesirable=1.3, desirable=0.9)
    want = diffusion_kto(e, ref, scores.value, 3.0, desirable=0.9, undesirable=1.3)
    torch.testing.assert_close(kto.loss(e, ref, scores, groups), want.mean())
    some = scores.take(torch.arange(24))
    some.value[:12] = 0  # dropped samples do not count
    want = diffusion_kto(e, ref, some.value, 3.0, desirable=0.9, undesirable=1.3)
    torch.testing.assert_close(kto.loss(e, ref, some, groups), want.sum() / 12)


def test_pairs_must_stay_together_and_be_there():
    groups = torch.zeros(4, dtype=torch.long)
    scores = credit(DRAGON(), single(1.0, 2.0, 3.0, 4.0))
    e = torch.ones(3, 1)
    with pytest.raises(ValueError, match="keep groups whole"):
        DRAGON().loss(e, e, scores.take([0, 1, 2]), groups[:3])
    with pytest.raises(ValueError, match=r"pairs that DRAGON.credit gives"):
        DRAGON().loss(e, e, single(1.0, -1.0, 1.0), groups[:3])
    with pytest.raises(ValueError, match="error_ref is None"):
        DRAGON().loss(torch.ones(4, 1), None, scores, groups)


def test_diagnostics():
    """Labels of single(0, 3, 1, 2): pairs 2 > 0 and 1 > 3; h = 0, 1, 2, 3."""
    scores = credit(DRAGON(), single(0.0, 3.0, 1.0, 2.0))
    e, ref = -torch.arange(4.0)[:, None], torch.zeros(4, 1)
    groups = torch.zeros(4, dtype=torch.long)
    found = DRAGON(beta=1.0).diagnostics(e, ref, scores, groups)
    assert found == {
        "labelled": 1, "implicit_accuracy": 0.5, "margin": 0.0, "reference_point": 1.5,
    }  # fmt: skip
    found = DRAGON(beta=1.0, objective="kto", paired=False).diagnostics(e, ref, scores, groups)
    assert found["implicit_accuracy"] == 0.5
    sets = credit(DRAGON(), of_sets(Of(mean), draw(8)))
    numbers = DRAGON().diagnostics(torch.ones(8, 1), torch.ones(8, 1), sets, torch.zeros(8).long())
    assert numbers["set_value"] > 0 and numbers["set_gain"] > 0
    assert numbers["implicit_accuracy"] == 0.5


@pytest.mark.parametrize(
    "options",
    [{}, {"builder": "influence"}, {"objective": "kto"}, {"objective": "kto", "paired": False}],
    ids=["dpo", "influence", "kto", "unpaired"],
)
@pytest.mark.parametrize("target, wide", [(1.0, 1.0), (-1.0, 1.0), (0.0, 1.6), (0.0, 0.5)])
def test_a_gaussian_moves_to_a_target_distribution(options, target, wide):
    """Model N(mu, exp(w)^2), error -log p; reward minus the distance to N(target, wide^2)."""
    mu, w = torch.zeros(2, dtype=torch.float64).unbind()
    parameters = [mu.clone().requires_grad_(), w.clone().requires_grad_()]
    optimizer = torch.optim.Adam(parameters, lr=0.03)
    algorithm, g = DRAGON(beta=0.1, **options), torch.Generator().manual_seed(0)
    reward, groups = Of(frechet(target, wide)), torch.arange(32).repeat_interleave(2)
    for iteration in range(20):
        mu, w = parameters
        x = mu.detach() + w.detach().exp() * torch.randn(64, 1, generator=g, dtype=torch.float64)
        scores = (score_set if "builder" in options else of_sets)(reward, x)
        scores = credit(algorithm.at(iteration / 20), scores, groups)
        error = ((x - mu) / w.exp()) ** 2 / 2 + w
        optimizer.zero_grad()
        algorithm.loss(error, x**2 / 2, scores, groups).backward()
        optimizer.step()
    mu, sigma = parameters[0].item(), parameters[1].exp().item()
    before, after = target**2 + (wide - 1) ** 2, (target - mu) ** 2 + (wide - sigma) ** 2
    assert after < 0.5 * before


# -- what is refused ----------------------------------------------------------------------------


def test_options_out_of_range():
    for options, says in [
        ({"objective": "ppo"}, "objective of DRAGON is one of dpo, kto"),
        ({"builder": "all"}, "builder of DRAGON is one of auto"),
        ({"start": "worse"}, "start of DRAGON is one of better, first"),
        ({"order": "sorted"}, "order of DRAGON is one of fixed, random"),
        ({"paired": False}, "needs paired=true"),
        ({"beta": 0.0}, "needs beta above 0"),
        ({"sweeps": 0}, "needs sweeps above 0"),
        ({"share": 0.6}, "share must be above 0 and at most 0.5"),
        ({"share": 0.0}, "share must be above 0 and at most 0.5"),
        ({"bound": -1.0}, "bound must be 0 or more"),
        ({"bound": INF}, "bound must be 0 or more"),
        ({"seed": -1}, "seed must be 0 or more"),
        ({"passes": 0}, "needs passes above 0"),
    ]:
        with pytest.raises(ValueError, match=says):
            DRAGON(**options)


def test_builders_fit_the_kind_of_reward():
    ordinary = lambda samples: samples.data.sum(1)  # noqa: E731
    ordinary.info = RewardInfo("ordinary")
    for options, reward, says in [
        ({"builder": "swap"}, ordinary, "builder='swap' needs a reward of sets"),
        ({"builder": "influence"}, ordinary, "builder='influence' needs a reward of sets"),
        ({"builder": "winners"}, Of(mean), "builder='winners' compares single samples"),
        ({"bound": 1.0}, Of(mean), "bound=1.0 needs standard deviations"),
    ]:
        algorithm = DRAGON(**options)
        scores = single(1.0, 2.0) if reward is ordinary else of_sets(reward, draw(2))
        with pytest.raises(ValueError, match=says):
            algorithm.check(reward)
        with pytest.raises(ValueError, match=says):
            credit(algorithm, scores)
    DRAGON().check(Of(mean))
    DRAGON(builder="top").check(Of(mean))
    DRAGON(builder="top", bound=1.0).check(ordinary)


def test_sets_that_are_too_small_or_odd():
    with pytest.raises(
        ValueError, match="'of' needs sets of 5 samples or more, and D1 and D2 have 4"
    ):
        credit(DRAGON(), of_sets(Of(mean, min_samples=5), draw(8)))
    credit(DRAGON(), of_sets(Of(mean, min_samples=4), draw(8)))
    with pytest.raises(ValueError, match="a prompt has 7"):
        credit(DRAGON(), of_sets(Of(mean), draw(7)))
    assert credit(DRAGON(builder="top"), single(1.0, 2.0, 3.0)).value.tolist() == [-1, 0, 1]


def test_values_that_are_no_numbers():
    x = draw(4)
    with pytest.raises(ValueError, match="the values of the two sets are nan and nan"):
        credit(DRAGON(), of_sets(Of(lambda x: torch.tensor(math.nan)), x))
    with pytest.raises(ValueError, match="NaN after an exchange of its sample 1"):
        swap_sets(
            lambda rows: math.nan if set(rows.tolist()) == {0, 3} else float(-rows.sum()),
            torch.tensor([0, 1]), torch.tensor([2, 3]),
        )  # fmt: skip


def test_scores_are_plain_and_float64():
    scores = credit(DRAGON(), Scores(torch.tensor([1.0, 2.0])))
    assert type(scores) is Scores and scores.value.dtype == torch.float64
    assert np.array_equal(scores.take([1, 0]).value.numpy(), [1.0, -1.0])
