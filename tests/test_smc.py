"""Resampling, weights and evidence against closed forms, and `particles` as oracle.

Statistical tests use fixed seeds and a bound of 5 standard errors of the known law.
"""

import math
from collections import Counter, namedtuple
from fractions import Fraction

import numpy as np
import particles.resampling as oracle
import pytest
import torch
from torch.testing import assert_close

from diffreward import smc
from diffreward.smc import RESAMPLERS, SMCState, gather_particles

SCHEMES = sorted(RESAMPLERS)
WEIGHTS = {
    "three": [0.2, 0.2, 0.6],  # [.1, .1, .3] normalised
    "four": [0.1, 0.1, 0.3, 0.5],
    "zeros": [0.0, 0.35, 0.0, 0.65, 0.0],
    "one": [0.0, 0.0, 1.0],
    "equal": [1 / 7] * 7,
    "integers": [0.25, 0.5, 0.0, 0.25],
    "skewed": [0.9, 0.05, 0.03, 0.015, 0.004, 0.001],
    "single": [1.0],
}
INF = math.inf


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Operations this small lose far more to thread hand-over than they gain."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def offspring(ancestors):
    return torch.nn.functional.one_hot(ancestors, ancestors.shape[1]).sum(dim=1)


def draw_offspring(scheme, weights, n, seed=0):
    w = torch.tensor(weights, dtype=torch.float64).repeat(n, 1)
    return offspring(RESAMPLERS[scheme](w, generator(seed)))


# Weights ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16])
def test_log_normalise_closed_form(dtype):
    log_weights = torch.tensor([[0.0, 1.0, -2.0, 0.5], [-INF, 3.0, -INF, 3.0]], dtype=dtype)
    log_W, log_mean = smc.log_normalise(log_weights)
    w = np.exp(log_weights.double().numpy())
    assert_close(log_W.exp().numpy(), w / w.sum(1, keepdims=True), rtol=1e-13, atol=0)
    assert_close(log_mean.numpy(), np.log(w.mean(1)), rtol=1e-13, atol=1e-15)


@pytest.mark.parametrize("shift", [-1e3, 0.0, 1e3])
def test_log_normalise_far_from_zero(shift):
    log_weights = torch.tensor([[0.0, math.log(3.0)]], dtype=torch.float64) + shift
    log_W, log_mean = smc.log_normalise(log_weights)
    assert_close(log_W.exp(), torch.tensor([[0.25, 0.75]], dtype=torch.float64))
    assert_close(log_mean.item(), shift + math.log(2.0))
    spread, log_mean = smc.log_normalise(torch.tensor([[-1e3, 1e3]]))
    assert spread.exp().tolist() == [[0.0, 1.0]]
    assert_close(log_mean.item(), 1e3 - math.log(2.0))


def test_equal_weights_are_exact():
    for k in range(1, 40):
        _, log_mean = smc.log_normalise(torch.zeros(1, k))
        assert log_mean.item() == 0.0


def test_dead_row_is_uniform_and_leaves_its_neighbour_alone():
    log_W, log_mean = smc.log_normalise(torch.tensor([[-INF, -INF], [0.0, -INF]]))
    assert_close(log_W.exp(), torch.tensor([[0.5, 0.5], [1.0, 0.0]], dtype=torch.float64))
    assert log_mean.tolist() == [-INF, -math.log(2.0)]


@pytest.mark.parametrize("bad", [math.nan, INF])
@pytest.mark.parametrize("call", ["log_normalise", "ess", "resample", "reweight"])
def test_nan_and_plus_inf_name_their_particle(bad, call):
    log_weights = torch.zeros(3, 4)
    log_weights[1, 2] = bad
    function = SMCState.init(3, 4).reweight if call == "reweight" else getattr(smc, call)
    with pytest.raises(ValueError, match="row 1, particle 2"):
        function(log_weights)


def test_ess_closed_forms():
    log_weights = torch.tensor(
        [
            [5.0] * 4,  # equal: k
            [0.0, -INF, -INF, -INF],  # one survivor: 1
            [1e3, 1e3, -1e3, -INF],  # two: 2
            [-INF] * 4,  # dead: k by definition
            [math.log(x) for x in (1, 2, 3, 4)],  # (sum w)^2 / sum w^2 = 100 / 30
        ],
        dtype=torch.float64,
    )
    expected = torch.tensor([4, 1, 2, 4, 100 / 30], dtype=torch.float64)
    assert_close(smc.ess(log_weights), expected)


def test_ess_stays_within_bounds():
    values = smc.ess(torch.randn(2000, 7, generator=generator()) * 50)
    assert (values >= 1).all() and (values <= 7).all()


# Schemes ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("weights", WEIGHTS.values(), ids=WEIGHTS)
def test_offspring_are_unbiased_within_bounds(scheme, weights):
    n, k = 20_000, len(weights)
    counts = draw_offspring(scheme, weights, n)
    assert (counts.sum(dim=1) == k).all()
    kw = k * torch.tensor(weights, dtype=torch.float64)
    # No scheme's variance exceeds the multinomial one, nor, if offspring is the floor or the
    # ceiling, f(1 - f) for the fractional part f.
    f = kw - (kw + 1e-9).floor()
    rounding = scheme in ("systematic", "ssp")
    variance = f * (1 - f) if rounding else kw * (1 - kw / k)
    error = (counts.double().mean(dim=0) - kw).abs()
    assert (error <= 5 * (variance.clamp(min=0) / n).sqrt() + 1e-12).all()

    low, high = (kw + 1e-9).floor(), (kw - 1e-9).ceil()
    if rounding:
        assert (counts >= low).all() and (counts <= high).all()
    elif scheme == "residual":
        assert (counts >= low).all()
    elif scheme == "stratified":
        assert ((counts - kw).abs() < 2).all()
    assert (counts[:, kw == 0] == 0).all()


@pytest.mark.parametrize("scheme", SCHEMES)
def test_ancestors_are_sorted_and_in_range(scheme):
    log_weights = torch.randn(500, 9, generator=generator()) * 4
    ancestors = smc.resample(log_weights, scheme, generator(1))
    assert ancestors.dtype == torch.int64 and ancestors.shape == (500, 9)
    assert (ancestors.diff(dim=1) >= 0).all()
    assert (ancestors >= 0).all() and (ancestors < 9).all()


def test_variances():
    """Multinomial has its closed form; residual and stratified stay below (Douc et al. 2005)."""
    weights = torch.tensor(WEIGHTS["four"], dtype=torch.float64)
    test_function = torch.tensor([1.0, -2.0, 0.5, 3.0], dtype=torch.float64)
    variance = {
        s: (draw_offspring(s, WEIGHTS["four"], 40_000).double() @ test_function).var().item()
        for s in SCHEMES
    }
    mean = weights @ test_function
    exact = 4 * (weights @ (test_function - mean) ** 2).item()
    assert_close(variance["multinomial"], exact, rtol=0.05, atol=0)
    assert variance["residual"] < 0.95 * exact and variance["stratified"] < 0.95 * exact


def test_residual_is_deterministic_on_integers_up_to_rounding():
    for k in range(1, 50):
        counts = offspring(smc.resample(torch.full((20, k), 0.1), "residual", generator()))
        assert (counts == 1).all()


def exact_ssp(weights):
    """Law of the offspring vector, by following both outcomes of every duel in fractions."""
    k = len(weights)
    kw = [k * w for w in weights]
    law = Counter()

    def duel(counts, first, a, j, probability):
        if probability == 0:
            return
        if j == k:
            assert a in (0, 1)
            counts[first] += int(a)
            law[tuple(counts)] += probability
            return
        b = kw[j] - math.floor(kw[j])
        if a + b < 1:
            share = a / (a + b) if a + b else Fraction(1)
            duel(list(counts), first, a + b, j + 1, probability * share)
            duel(list(counts), j, a + b, j + 1, probability * (1 - share))
        else:
            share = (1 - b) / (2 - a - b)
            for winner, loser, chance in ((first, j, share), (j, first, 1 - share)):
                after = list(counts)
                after[winner] += 1
                duel(after, loser, a + b - 1, j + 1, probability * chance)

    duel([math.floor(x) for x in kw], 0, kw[0] - math.floor(kw[0]), 1, Fraction(1))
    return law


def seed_numba(seed):
    import numba

    numba.njit(lambda s: np.random.seed(s))(seed)  # particles' SSP draws inside compiled code


def assert_frequencies(counts, law, n):
    seen = Counter(map(tuple, counts))
    assert set(seen) <= set(law)
    for outcome, probability in law.items():
        q = float(probability)
        assert abs(seen[outcome] / n - q) <= 5 * math.sqrt(q * (1 - q) / n) + 1e-12


@pytest.mark.parametrize("tenths", [[2, 2, 6], [1, 1, 3, 5], [0, 3, 0, 4, 3, 0]])
def test_ssp_law(tenths):
    weights = [Fraction(t, 10) for t in tenths]
    law = exact_ssp(weights)
    for j, w in enumerate(weights):  # the enumeration itself is unbiased
        assert sum(p * counts[j] for counts, p in law.items()) == len(weights) * w
    floats = [float(w) for w in weights]
    assert_frequencies(draw_offspring("ssp", floats, 20_000).tolist(), law, 20_000)
    seed_numba(3)
    theirs = [
        np.bincount(oracle.ssp(np.array(floats)), minlength=len(floats)).tolist()
        for _ in range(5000)
    ]
    assert_frequencies(theirs, law, 5000)


def test_ssp_law_by_hand():
    # k W = .6, .6, 1.8. Particles 0 and 1 duel: either rounds up, the other keeps .2 and meets .8.
    fifth = Fraction(1, 5)
    by_hand = {(1, 0, 2): 2 * fifth, (0, 1, 2): 2 * fifth, (1, 1, 1): fifth}
    assert exact_ssp([fifth, fifth, 3 * fifth]) == by_hand


class Uniforms:
    """Stands in for numpy.random inside `particles`, handing out given draws."""

    def __init__(self, values):
        self.values = values

    def rand(self, n):
        return self.values[:n].copy()


@pytest.mark.parametrize("scheme", ["multinomial", "residual", "stratified", "systematic"])
def test_same_ancestors_as_particles(scheme, monkeypatch):
    # The oracle's multinomial transforms other uniforms, so it is given the sorted ones.
    monkeypatch.setattr(
        oracle,
        "multinomial",
        lambda W, M: oracle.inverse_cdf(np.sort(oracle.random.rand(M)), W),
    )
    for seed in range(200):
        k = 2 + seed % 11
        W = torch.rand(1, k, generator=generator(seed), dtype=torch.float64) ** 3
        W /= W.sum()
        draws = torch.rand(k, generator=generator(1000 + seed), dtype=torch.float64).numpy()
        monkeypatch.setattr(oracle, "random", Uniforms(draws))
        theirs = getattr(oracle, scheme)(W[0].numpy(), M=k)
        ours = RESAMPLERS[scheme](W, generator(1000 + seed))[0]
        assert ours.tolist() == sorted(theirs.tolist())


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("extreme", [0.0, math.nextafter(1.0, 0.0)])
def test_extreme_uniforms_and_short_cumulative_sums(scheme, extreme, monkeypatch):
    monkeypatch.setattr(
        smc, "_uniforms", lambda W, n, generator: torch.full((len(W), n), extreme).double()
    )
    for k in (1, 3, 10, 49):
        w = torch.zeros(3, k, dtype=torch.float64)
        w[0] = 1 / k
        w[1, k // 2] = 1.0  # zeros at both ends
        w[2] = (1 - 1e-12) / k  # sums to less than 1
        ancestors = RESAMPLERS[scheme](w, None)
        assert (ancestors >= 0).all() and (ancestors < k).all()
        assert (ancestors[1] == k // 2).all()


def test_unknown_scheme_lists_near_match():
    for call in (
        lambda s: smc.resample(torch.zeros(1, 2), s),
        lambda s: SMCState.init(1, 2).resample(torch.tensor([False]), s),
    ):
        with pytest.raises(ValueError, match=r"multinomial, .*ssp.*Did you mean 'systematic'"):
            call("sistematic")


def test_one_generator_per_row():
    with pytest.raises(ValueError, match="2 generators for 3 rows"):
        smc.resample(torch.zeros(3, 4), "ssp", [generator(), generator()])
    with pytest.raises(ValueError, match="2 generators for 3 rows"):
        SMCState.init(3, 4).resample(torch.ones(3).bool(), "ssp", [generator()] * 2)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_global_generator(scheme):
    torch.manual_seed(0)
    first = smc.resample(torch.randn(5, 6, generator=generator()), scheme)
    torch.manual_seed(0)
    assert_close(smc.resample(torch.randn(5, 6, generator=generator()), scheme), first)


# State --------------------------------------------------------------------------------------------


def run(increments, seeds, threshold, scheme):
    """One state over increments (steps, p, k), and the particles' own labels alongside."""
    _, p, k = increments.shape
    state, generators = SMCState.init(p, k), [generator(s) for s in seeds]
    labels = torch.arange(p * k)
    for increment in increments:
        state.reweight(increment)
        ancestors = state.resample(state.should_resample(threshold), scheme, generators)
        labels = gather_particles(labels, ancestors)
    return state, labels.reshape(p, k)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("threshold", [None, 0.5])
def test_rows_do_not_depend_on_the_batch(scheme, threshold):
    increments = torch.randn(6, 5, 8, generator=generator())
    whole, labels = run(increments, range(5), threshold, scheme)
    for rows in ([3], [4, 0], [2, 1, 3]):
        part, _ = run(increments[:, rows], rows, threshold, scheme)
        for name in ("log_weights", "log_z", "roots"):
            assert torch.equal(getattr(part, name), getattr(whole, name)[rows])
        assert torch.equal(torch.stack(part.ancestors), torch.stack(whole.ancestors)[:, rows])
    # Rows never mix, and `roots` is what the permuted particles say it is.
    assert torch.equal(labels // 8, torch.arange(5)[:, None].expand(5, 8))
    assert torch.equal(labels % 8, whole.roots)


def test_masked_rows_are_left_alone():
    state = SMCState.init(3, 4)
    increment = torch.randn(3, 4, generator=generator(), dtype=torch.float64)
    increment[1] = torch.tensor([-INF, -INF, 0.0, -INF])
    state.reweight(increment)
    generators = [generator(s) for s in range(3)]
    before = [g.get_state() for g in generators]
    ancestors = state.resample(torch.tensor([False, True, False]), "multinomial", generators)
    assert ancestors.tolist() == [[0, 1, 2, 3], [2, 2, 2, 2], [0, 1, 2, 3]]
    assert torch.equal(state.log_weights[[0, 2]], increment[[0, 2]])
    assert state.log_weights[1].tolist() == [0.0] * 4
    assert_close(state.log_z, torch.tensor([0.0, -math.log(4.0), 0.0], dtype=torch.float64))
    assert state.num_roots().tolist() == [4, 1, 4]
    for row, (g, old) in enumerate(zip(generators, before, strict=True)):
        assert torch.equal(g.get_state(), old) == (row != 1)


def test_histories_record_every_opportunity():
    state = SMCState.init(2, 4)
    state.resample(state.should_resample(0.5), "systematic", generator())
    state.reweight(torch.tensor([[0.0, -INF, -INF, -INF], [0.0] * 4]))
    state.resample(state.should_resample(0.5), "systematic", generator())
    assert [e.tolist() for e in state.ess_history] == [[4.0, 4.0], [1.0, 4.0]]
    assert state.ancestors[0].tolist() == [[0, 1, 2, 3]] * 2
    assert state.ancestors[1].tolist() == [[0] * 4, [0, 1, 2, 3]]


def test_should_resample():
    state = SMCState.init(3, 4)
    log_weights = torch.tensor([[0.0] * 4, [1e3, 1e3, -INF, -INF], [-INF] * 4])
    state.reweight(log_weights)  # ESS 4, 2, and 4 by definition
    assert state.should_resample(None).tolist() == [True] * 3
    assert state.should_resample(1.0).tolist() == [True] * 3
    assert state.should_resample(0.99).tolist() == [False, True, False]
    assert state.should_resample(0.5).tolist() == [False, True, False]
    assert state.should_resample(0.49).tolist() == [False] * 3
    assert state.should_resample(0.0).tolist() == [False] * 3
    for threshold in (4.0, -0.1, math.nan):
        with pytest.raises(ValueError, match="fraction"):
            state.should_resample(threshold)


def test_rounding_hides_no_row_at_its_threshold():
    for k in range(1, 40):
        log_weights = torch.full((k, k), 0.1).tril().where(torch.ones(k, k).tril() > 0, -INF)
        state = SMCState.init(k, k)
        state.reweight(log_weights)  # row m has m + 1 equal weights: its ESS
        assert (state.ess() >= 1).all() and (state.ess() <= k).all()
        for m in range(k):
            due = state.should_resample((m + 1) / k)
            assert due.tolist() == [row <= m for row in range(k)]


def test_dead_population_stays_dead_and_its_neighbour_does_not():
    state = SMCState.init(2, 4)
    for _ in range(3):
        state.reweight(torch.tensor([[-INF] * 4, [math.log(2.0)] * 4]))
        state.resample(state.should_resample(None), "systematic", generator())
    assert state.log_evidence()[0].item() == -INF
    assert_close(state.log_evidence()[1].item(), 3 * math.log(2.0))


def test_reweight_refuses_other_shapes_and_holds_no_graph():
    state = SMCState.init(2, 4)
    with pytest.raises(ValueError, match=r"\(2, 1\).*\(2, 4\)"):
        state.reweight(torch.zeros(2, 1))
    with pytest.raises(ValueError, match="mask"):
        state.resample(torch.tensor([True]))
    with pytest.raises(ValueError, match="at least 1"):
        SMCState.init(2, 0)
    state.reweight(torch.ones(2, 4, dtype=torch.bfloat16, requires_grad=True))
    assert state.log_weights.dtype == torch.float64 and not state.log_weights.requires_grad


@pytest.mark.parametrize("scheme", SCHEMES)
def test_shift_invariance(scheme):
    increments = torch.randn(5, 3, 8, generator=generator(), dtype=torch.float64)
    plain, _ = run(increments, range(3), 0.5, scheme)
    shifted, _ = run(increments + 2.5, range(3), 0.5, scheme)
    assert torch.equal(torch.stack(plain.ancestors), torch.stack(shifted.ancestors))
    assert_close(shifted.log_evidence(), plain.log_evidence() + 5 * 2.5)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("threshold", [None, 0.5, 0.0])
def test_two_points_keep_weights_of_skipped_resamplings(scheme, threshold):
    """Rewards {0, 0.8}, reached in two increments: the better point has mass e^.8 / (1 + e^.8).

    At ESS threshold 0.5 nothing is ever resampled, and dropping the weights would give 0.5.
    """
    p, k = 4000, 8
    better = torch.rand(p, k, generator=generator()) < 0.5
    state, draws = SMCState.init(p, k), generator(1)
    for part in (0.3, 0.5):
        state.reweight(part * better.double())
        ancestors = state.resample(state.should_resample(threshold), scheme, draws)
        better = gather_particles(better.flatten(), ancestors).reshape(p, k)
    log_W, _ = smc.log_normalise(state.log_weights)
    z = state.log_evidence().exp()  # weighting rows by it makes the ratio consistent at any k
    mass = (z * (log_W.exp() * better).sum(dim=1)).sum() / z.sum()
    exact = math.exp(0.8) / (1 + math.exp(0.8))
    assert_close(exact, 0.690, atol=5e-4, rtol=0)
    assert abs(mass.item() - exact) < 0.015


# Evidence -----------------------------------------------------------------------------------------


def assert_mean(samples, exact):
    error = samples.std() / math.sqrt(len(samples))
    assert abs(samples.mean().item() - exact) <= 5 * error.item()


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("threshold", [None, 1.0, 0.7, 0.0])
def test_evidence_of_importance_sampling_is_unbiased(scheme, threshold):
    """x ~ N(0, 1), weight exp(x) in three parts: E[estimate of Z] = exp(1/2) for any k."""
    p, k = 10_000, 5
    x = torch.randn(p, k, generator=generator(2), dtype=torch.float64)
    state, draws = SMCState.init(p, k), generator(3)
    for part in (0.5, 0.3, 0.2):
        state.reweight(part * x)
        ancestors = state.resample(state.should_resample(threshold), scheme, draws)
        x = gather_particles(x.flatten(), ancestors).reshape(p, k)
    assert_mean(state.log_evidence().exp(), math.exp(0.5))


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("threshold", [None, 0.7, 0.0])
def test_evidence_and_law_of_an_enumerable_chain(scheme, threshold):
    """Three states, moves between resamplings, weights down to zero: Z is a matrix product."""
    start = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    move = torch.tensor([[0.6, 0.3, 0.1], [0.2, 0.5, 0.3], [0.1, 0.1, 0.8]], dtype=torch.float64)
    potentials = torch.tensor([[1, 2, 0.5], [0, 1, 3], [2, 0.2, 1]], dtype=torch.float64)
    forward = start * potentials[0]
    for g in potentials[1:]:
        forward = (forward @ move) * g

    p, k = 10_000, 4
    draws = generator(5)
    x = torch.multinomial(start, p * k, replacement=True, generator=draws)
    state = SMCState.init(p, k)
    for i, g in enumerate(potentials):
        if i:
            x = torch.multinomial(move[x], 1, generator=draws).flatten()
        state.reweight(g.log()[x].reshape(p, k))
        x = gather_particles(x, state.resample(state.should_resample(threshold), scheme, draws))
    z = state.log_evidence().exp()
    assert_mean(z, forward.sum().item())
    log_W, _ = smc.log_normalise(state.log_weights)
    for value in range(3):  # unnormalised terminal law, also unbiased
        hit = (log_W.exp() * (x.reshape(p, k) == value)).sum(dim=1)
        assert_mean(z * hit, forward[value].item())


# Permuting ----------------------------------------------------------------------------------------


class Taken:
    """Any object with `take`."""

    def __init__(self, values):
        self.values = values

    def __len__(self):
        return len(self.values)

    def take(self, indices):
        return Taken(self.values[indices])


Pair = namedtuple("Pair", ["x", "law"])


def test_gather_particles_permutes_every_leaf_alike():
    ancestors = torch.tensor([[0, 0, 2], [1, 2, 2]])
    flat = [0, 0, 2, 4, 5, 5]
    assert smc.flat_indices(ancestors).tolist() == flat
    values = torch.arange(6)
    tree = {
        "latents": values.float()[:, None, None].expand(6, 2, 2),
        "history": [values, None],
        "pair": Pair(values, Taken(values)),
        "tuple": (values,),
    }
    out = gather_particles(tree, ancestors)
    assert out["latents"][:, 0, 0].tolist() == flat and out["latents"].shape == (6, 2, 2)
    assert out["history"][0].tolist() == flat and out["history"][1] is None
    assert isinstance(out["pair"], Pair) and out["pair"].law.values.tolist() == flat
    assert out["tuple"][0].tolist() == flat
    assert values.tolist() == list(range(6))


@pytest.mark.parametrize("bad", [torch.zeros(2, 3), torch.tensor(1.0), Taken(torch.zeros(2))])
def test_gather_particles_needs_one_entry_per_particle(bad):
    with pytest.raises(ValueError, match=r"state\['x'\]\[0\] has \d entries for 6 particles"):
        gather_particles({"x": [bad]}, torch.zeros(2, 3, dtype=torch.int64))


@pytest.mark.parametrize("bad", [1.0, "prompt", np.zeros((6, 2))])
def test_gather_particles_refuses_other_leaves(bad):
    with pytest.raises(TypeError, match=r"state\[0\]"):
        gather_particles([bad], torch.zeros(2, 3, dtype=torch.int64))


@pytest.mark.parametrize("bad", [-1, 3])
def test_flat_indices_never_reach_into_another_row(bad):
    with pytest.raises(ValueError, match="another row"):
        smc.flat_indices(torch.tensor([[0, 1, 2], [0, bad, 2]]))
