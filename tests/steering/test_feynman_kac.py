"""Feynman-Kac steering against truth: chains whose tilted laws are known exactly.

The main tool is `assert_unbiased`. For every number of particles K, scheme, potential and trigger,
the unnormalised estimate is unbiased (Del Moral 2004, theorem 7.4.2):

    E[exp(log_z) * sum_j W_j f(x_j)] = E_p[exp(lambda r(x)) f(x)] = Z E_tilted[f(x)].

Hundreds of prompts with small K in one call are independent replicates, so a t-test needs no bound
on a bias, and small K resamples often, which shows mistakes. |t| < 4.5 is used throughout: about
1000 such statistics are computed, and with correct code one of them would fail once in 150 choices
of the seeds (which are fixed).

``max`` and ``sum`` tilt the intermediate laws further than the last one; the weights that undo it
are heavy-tailed (of infinite variance for a quadratic reward, if lambda is large), and no t-test
holds for those. Hence the gentler `tilt`.
"""

import math
import warnings

import pytest
import torch
from toys import (
    ARChain,
    CategoricalLaw,
    MaskedChain,
    MixtureChain,
    NormalLaw,
    Toy,
    TwoPointChain,
    shared_generators,
    steer_with,
)

from diffreward.policies.gaussian import GaussianLaw
from diffreward.policy import Policy, rollout, sample_generators
from diffreward.rewards.base import RewardInfo, Scores, as_reward, make_reward
from diffreward.smc import RESAMPLERS
from diffreward.steering.feynman_kac import POTENTIALS, FeynmanKac, shrink, steer

pytestmark = pytest.mark.filterwarnings("ignore:all .* particles descend from one root")

T_MAX = 4.5
THRESHOLDS = [None, 1.0, 0.6, 0.0]


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """These tensors are tiny: a second thread only waits, for long where cores are busy."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def many(monkeypatch):
    """Let thousands of particles share a generator: their own ones cost most of the time."""
    steer_with(shared_generators, monkeypatch)


def run(policy, reward, prompts, **options):
    return steer(policy, reward, prompts, progress=False, **options)


def linear(samples):
    return samples.data[:, 0]


def quadratic(samples):
    return -((samples.data[:, 0] - 1) ** 2) / 2


def tilt(potential, usual):
    """Lambda: ``usual``, but little where the potential overshoots; see the module docstring."""
    return {"sum": 0.2, "max": 0.6}.get(potential, usual)


def by_prompt(result, values):
    return values.view(result.log_weights.shape)


def assert_unbiased(result, f, expected, log_z, rows=slice(None)):
    """t-test of E[exp(log_z) * weighted mean of f] = Z * expected, prompts being replicates."""
    z = (result.log_z - log_z).exp()  # in units of the true Z
    weights = result.log_weights.softmax(1)
    weights[z == 0] = 0.0  # a population that died has no normalised weights
    values = (z * (weights * by_prompt(result, f)).sum(1))[rows]
    error = values.std() / math.sqrt(len(values))
    t = float((values.mean() - expected) / error)
    assert abs(t) < T_MAX, (
        f"{values.mean():.4f} +- {error:.4f} where {expected:.4f} is true: t = {t:.1f}"
    )


def assert_normal(result, mean, var, log_z, rows=slice(None)):
    """Z, mean and second moment of one-dimensional particles."""
    x = result.particles.data[:, 0]
    assert_unbiased(result, torch.ones_like(x), 1.0, log_z, rows)
    assert_unbiased(result, x, mean, log_z, rows)
    assert_unbiased(result, (x - mean) ** 2, var, log_z, rows)


def assert_same_result(a, b, rows=None):
    """All that a result says of the prompts ``rows`` is equal, bit for bit."""
    (pa, k), (pb, _) = a.log_weights.shape, b.log_weights.shape
    rows = list(range(pa)) if rows is None else rows

    def particles(result, p):
        data = result.particles.data
        return data.view(p, k, *data.shape[1:])[rows]

    assert torch.equal(particles(a, pa), particles(b, pb))
    assert torch.equal(a.scores.value.view(pa, k)[rows], b.scores.value.view(pb, k)[rows])
    assert torch.equal(a.samples.data[rows], b.samples.data[rows])
    for name in ("log_weights", "log_z", "roots", "best"):
        assert torch.equal(getattr(a, name)[rows], getattr(b, name)[rows]), name
    for name in ("ancestors", "ess", "lmbdas"):
        assert torch.equal(getattr(a, name)[:, rows], getattr(b, name)[:, rows]), name


# The toys themselves ------------------------------------------------------------------------


@pytest.mark.parametrize(
    "policy", [ARChain(), MixtureChain([0.5, 0.5], [[0.0], [1.0]], [1.0, 0.5]), MaskedChain(),
               TwoPointChain()],
)  # fmt: skip
def test_toys_are_policies(policy):
    assert isinstance(policy, Policy)
    condition = policy.encode(["0.5", "a word"])
    path = rollout(policy, condition, sample_generators(0, 2, 1), keep_path=True, log_prob=True)
    assert path.log_probs.shape == (2, policy.num_steps)
    assert path.final.dtype in (torch.float64, torch.int64)


def test_enumeration_agrees_with_rollouts():
    policy, n = MaskedChain(), 20000
    states, probs = policy.enumerate()
    assert len(states) == 27
    torch.testing.assert_close(probs.sum(), torch.tensor(1.0, dtype=torch.float64))
    final = rollout(policy, policy.encode([""] * n), torch.Generator().manual_seed(0)).final
    share = (final[:, None] == states).all(2).double().mean(0)
    assert ((share - probs).abs() < T_MAX * (probs * (1 - probs) / n).sqrt() + 1e-9).all()


# Gaussian chain -----------------------------------------------------------------------------


@pytest.mark.parametrize("proposal", ["policy", "gradient"])
@pytest.mark.parametrize("ess_threshold", THRESHOLDS)
@pytest.mark.parametrize("resampling", RESAMPLERS)
@pytest.mark.parametrize("potential", POTENTIALS)
def test_linear_reward_of_gaussian_chain(many, potential, resampling, ess_threshold, proposal):
    """N(0, 1) tilted by exp(lambda x) is N(lambda, 1); log Z = lambda^2 / 2."""
    lmbda = tilt(potential, 1.0)
    result = run(
        ARChain(4, 0.8), linear, [""] * 400, num_particles=6, lmbda=lmbda, potential=potential,
        resampling=resampling, ess_threshold=ess_threshold, proposal=proposal, schedule=1,
    )  # fmt: skip
    if ess_threshold == 0.6 and potential != "none":  # some populations, not all
        share = (result.ancestors != torch.arange(6)).any(2).double().mean()
        assert 0.01 < share < 0.9
    assert_normal(result, lmbda, 1.0, lmbda**2 / 2)


@pytest.mark.parametrize("proposal", ["policy", "gradient"])
@pytest.mark.parametrize("ess_threshold", [None, 1.0, 0.5, 0.0])
@pytest.mark.parametrize("potential", POTENTIALS)
def test_quadratic_reward_of_gaussian_chain(many, potential, ess_threshold, proposal):
    """r = -(x - 1)^2 / 2 tilts N(0, 1) to N(l / (1 + l), 1 / (1 + l))."""
    lmbda = tilt(potential, 3.0)
    result = run(
        ARChain(4, 0.6), quadratic, [""] * 400, num_particles=6, lmbda=lmbda, potential=potential,
        ess_threshold=ess_threshold, proposal=proposal, schedule=1,
    )  # fmt: skip
    log_z = -0.5 * math.log(1 + lmbda) - lmbda / (2 * (1 + lmbda))
    assert_normal(result, lmbda / (1 + lmbda), 1 / (1 + lmbda), log_z)


@pytest.mark.parametrize("potential", ["difference", "running_max"])
def test_weighted_particles_of_one_large_population(many, potential):
    """One prompt, K = 20000: what the user reads off, without a correction by log Z.

    Bounds: Monte Carlo errors of a population that was resampled up to H = 3 times are at most
    those of H + 1 independent stages, each with K min(ESS)/K effective draws.
    """
    lmbda, k = 1.0, 20000
    result = run(
        ARChain(), linear, "", num_particles=k, lmbda=lmbda, potential=potential, schedule=1
    )
    n = float(result.ess.min()) / len(result.ess)
    weights, x = result.log_weights.softmax(1)[0], result.particles.data[:, 0]
    mean = float((weights * x).sum())
    assert mean == pytest.approx(lmbda, abs=T_MAX / math.sqrt(n))
    var = float((weights * (x - mean) ** 2).sum())
    assert var == pytest.approx(1.0, abs=T_MAX * math.sqrt(2 / n))
    spread = math.sqrt(math.exp(lmbda**2) - 1)  # relative standard deviation of exp(lambda x)
    assert float(result.log_z) == pytest.approx(lmbda**2 / 2, abs=T_MAX * spread / math.sqrt(n))


@pytest.mark.parametrize("lmbda", [-0.8, 0.3])
def test_negative_and_small_lambda(many, lmbda):
    result = run(ARChain(), linear, [""] * 400, lmbda=lmbda, schedule=1, ess_threshold=0.9)
    assert_normal(result, lmbda, 1.0, lmbda**2 / 2)


def test_laws_of_the_package_do_as_well(many):
    """`GaussianLaw` with its ``(b, 1)`` std, one step of it deterministic, in two dimensions."""

    class Chain(ARChain):
        def law(self, x, i, condition):
            law = super().law(x, i, condition)
            std = torch.full((len(x), 1), 0.0 if i == 3 else law.std, dtype=torch.float64)
            mean = x if i == 3 else law.mean  # nothing happens at the last step
            r = math.sqrt(self.a) ** max(self.num_steps - 1 - i, 0)
            return GaussianLaw(r * x, mean, std, std)

    lmbda = 0.8
    for proposal in ("policy", "gradient"):
        result = run(
            Chain(dim=2), linear, [""] * 300, lmbda=lmbda, schedule=1, ess_threshold=0.9,
            proposal=proposal,
        )  # fmt: skip
        assert_normal(result, lmbda, 1.0, lmbda**2 / 2)
        other = result.particles.data[:, 1]  # untouched by the reward
        assert_unbiased(result, other, 0.0, lmbda**2 / 2)
        assert_unbiased(result, other**2, 1.0, lmbda**2 / 2)


# Gaussian mixture ---------------------------------------------------------------------------


@pytest.mark.parametrize("potential", POTENTIALS)
def test_linear_reward_of_mixture(many, potential):
    lmbda, b = tilt(potential, 0.7), torch.tensor([1.0, -0.5], dtype=torch.float64)
    policy = MixtureChain([0.5, 0.3, 0.2], [[-1.5, 0.0], [1.0, 1.0], [0.0, -2.0]], [0.6, 0.4, 0.9])
    log_z, weights, means = policy.tilted(b, lmbda)
    result = run(
        policy, lambda s: s.data @ b, [""] * 400, num_particles=6, lmbda=lmbda,
        potential=potential, schedule=1, ess_threshold=0.8,
    )  # fmt: skip
    x = result.particles.data
    assert_unbiased(result, torch.ones(len(x)), 1.0, log_z)
    for d in range(2):
        assert_unbiased(result, x[:, d], weights @ means[:, d], log_z)
        second = weights @ (means[:, d] ** 2 + policy.sd**2)
        assert_unbiased(result, x[:, d] ** 2, second, log_z)
    # not only moments: the share beyond a threshold
    tail = weights @ (1 - torch.distributions.Normal(means[:, 0], policy.sd).cdf(torch.tensor(1.0)))
    assert_unbiased(result, (x[:, 0] > 1).double(), tail, log_z)


# Enumerable chain ---------------------------------------------------------------------------


def token_reward(samples):
    """Linear and pairwise terms; of probabilities, their expectation under independence."""
    p = samples.data
    p = p if p.is_floating_point() else torch.nn.functional.one_hot(p, 3).double()
    agree = (p[:, 0] * p[:, 1]).sum(1) - (p[:, 1] * p[:, 2]).sum(1)
    return agree + p[:, 0, 2] + 0.5 * p[:, 2, 0]


def tilted(policy, reward, lmbda):
    """(states, log Z, probabilities) of the enumerated chain under exp(lambda r)."""
    states, probs = policy.enumerate()
    samples = policy.decode(states, policy.encode([""] * len(states)))
    log_w = probs.log() + lmbda * reward(samples).double()
    return states, log_w.logsumexp(0), log_w.softmax(0)


TEMPERING = ["constant", "linear", lambda fraction: 1.5 - fraction]


@pytest.mark.parametrize("ess_threshold", [None, 0.7])
@pytest.mark.parametrize("resampling", RESAMPLERS)
@pytest.mark.parametrize("potential", POTENTIALS)
def test_enumerable_chain_and_unbiased_z(many, potential, resampling, ess_threshold):
    """Total variation to the enumerated law, and E[exp(log_z)] = Z, with K = 4."""
    policy, p = MaskedChain(), 1000
    cell = list(RESAMPLERS).index(resampling) + list(POTENTIALS).index(potential)
    states, log_z, law = tilted(policy, token_reward, 1.5)
    result = run(
        policy, token_reward, [""] * p, num_particles=4, lmbda=1.5, potential=potential,
        resampling=resampling, ess_threshold=ess_threshold, schedule=1,
        tempering=TEMPERING[cell % 3],
    )  # fmt: skip
    assert result.particles.data.dtype == torch.int64
    assert_unbiased(result, torch.ones(4 * p), 1.0, log_z)

    z = (result.log_z - log_z).exp()
    here = by_prompt(result, (result.particles.data @ torch.tensor([9, 3, 1])).double())
    each = (here[..., None] == torch.arange(27)).double()
    share = z[:, None] * (result.log_weights.softmax(1)[..., None] * each).sum(1)  # (p, 27)
    assert (states @ torch.tensor([9, 3, 1]) == torch.arange(27)).all()
    error = share.std(0) / math.sqrt(p)
    tv = 0.5 * (share.mean(0) - law).abs().sum()
    # chance gives 0.5 * sum(error) * sqrt(2 / pi) on average; few cells have most of it, so that
    # the largest ratio in 400 runs with other seeds was 2.5
    assert tv < 3.5 * 0.5 * error.sum() * math.sqrt(2 / math.pi)
    common = law > 0.02  # the other cells are hit too rarely for normal errors
    assert common.sum() >= 5
    assert ((share.mean(0) - law).abs() < T_MAX * error)[common].all()
    assert tv < 0.1 < 0.5 * (policy.enumerate()[1] - law).abs().sum()  # the tilt is larger


@pytest.mark.parametrize("tempering", TEMPERING)
@pytest.mark.parametrize("k", [2, 16])
def test_unbiased_z_whatever_k_and_tempering(many, k, tempering):
    lmbda = 0.8
    result = run(
        ARChain(), linear, [""] * 600, num_particles=k, lmbda=lmbda, schedule=[0, 2],
        ess_threshold=0.8, tempering=tempering,
    )  # fmt: skip
    assert_normal(result, lmbda, 1.0, lmbda**2 / 2)
    factors = {"constant": [1, 1], "linear": [0.25, 0.75]}.get(tempering, [1.25, 0.75])
    expected = lmbda * torch.tensor(factors, dtype=torch.float64)
    torch.testing.assert_close(result.lmbdas, expected[:, None].expand(2, 600))


# Two points ---------------------------------------------------------------------------------


@pytest.mark.parametrize("potential", POTENTIALS)
@pytest.mark.parametrize("flip", [0.0, 0.2])
def test_skipped_resampling_keeps_the_weights(many, potential, flip):
    """Rewards 0 and 0.8: ESS stays high, nothing is resampled, and P(1) is 0.690, not 0.5."""
    k = 20000
    result = run(
        TwoPointChain(flip=flip), lambda s: 0.8 * s.data[:, 0].double(), "", num_particles=k,
        lmbda=1.0, potential=potential, ess_threshold=0.3, schedule=[0],
    )  # fmt: skip
    identity = torch.arange(k)
    assert (result.ancestors == identity).all()
    share = float((result.log_weights.softmax(1)[0] * result.particles.data[:, 0]).sum())
    truth = math.exp(0.8) / (1 + math.exp(0.8))
    assert truth == pytest.approx(0.690, abs=5e-4)
    assert share == pytest.approx(truth, abs=T_MAX * 0.5 / math.sqrt(0.8 * k))
    assert float(result.log_z) == pytest.approx(math.log((1 + math.exp(0.8)) / 2), abs=0.02)


# Adaptive lambda ----------------------------------------------------------------------------


@pytest.mark.parametrize("target_ess", [0.5, 0.9])
def test_adaptive_lambda(many, target_ess):
    """Exact as K grows, and ESS is what was asked for wherever lambda rose."""
    lmbda, p, k = 2.0, 40, 1000
    result = run(
        ARChain(6, 0.9), linear, [""] * p, num_particles=k, lmbda=lmbda, tempering="adaptive",
        target_ess=target_ess, ess_threshold=target_ess, schedule=1,
    )  # fmt: skip
    lmbdas = result.lmbdas
    assert (lmbdas >= 0).all() and (lmbdas <= lmbda).all()
    before = torch.cat([torch.zeros(1, p), lmbdas[:-1]])
    assert (lmbdas >= before).all()
    assert (lmbdas[0] < lmbda).all() and (lmbdas[-1] > lmbdas[0]).all()
    rose = lmbdas > before
    assert (result.ess[:-1][rose] >= target_ess * k * (1 - 1e-6)).all()
    capped = lmbdas < lmbda  # as large as possible, therefore exactly there
    torch.testing.assert_close(
        result.ess[:-1][rose & capped], torch.tensor(target_ess * k).double().expand(
            int((rose & capped).sum())), rtol=1e-6, atol=0,
    )  # fmt: skip
    x = by_prompt(result, result.particles.data[:, 0])
    means = (result.log_weights.softmax(1) * x).sum(1)
    error = float(means.std()) / math.sqrt(p)
    # bias of order 1 / ESS on top of the replicates' error
    slack = 10 / float(result.ess.min())
    assert float(means.mean()) == pytest.approx(lmbda, abs=T_MAX * error + slack)
    assert float(result.log_z.mean()) == pytest.approx(lmbda**2 / 2, abs=0.1)


# Exact equalities ---------------------------------------------------------------------------

POLICIES = {
    "ar": (lambda: ARChain(dim=2), linear),
    "mixture": (lambda: MixtureChain([0.5, 0.5], [[-1.0], [1.0]], [0.5, 1.0]), linear),
    "masked": (MaskedChain, token_reward),
    "two-point": (lambda: TwoPointChain(flip=0.2), lambda s: s.data[:, 0].double()),
}


@pytest.mark.parametrize(
    ("k", "options"),
    [
        (5, {"lmbda": 0.0}),
        (5, {"lmbda": 0.0, "ess_threshold": None, "potential": "max", "tempering": "adaptive"}),
        (5, {"lmbda": 0.0, "ess_threshold": None, "resampling": "multinomial"}),
        (1, {"lmbda": 10.0}),
        (1, {"lmbda": 10.0, "ess_threshold": None, "potential": "sum"}),
    ],
)
@pytest.mark.parametrize("name", POLICIES)
def test_no_tilt_or_one_particle_is_plain_sampling(name, k, options):
    make, reward = POLICIES[name]
    policy, prompts = make(), ["0", "1", "-2"]
    plain = rollout(policy, policy.encode(prompts).repeat(k), sample_generators(7, 3, k)).final
    calls = policy.calls
    result = run(policy, reward, prompts, num_particles=k, seed=7, schedule=1, **options)
    assert torch.equal(result.particles.data, plain)
    assert policy.calls == 2 * calls
    assert (result.ancestors == torch.arange(k)).all()
    assert (result.roots == k).all()
    assert result.particles.prompts == [p for p in prompts for _ in range(k)]
    expected = options["lmbda"] * result.scores.value.double().view(3, k)
    torch.testing.assert_close(result.log_weights, expected)


@pytest.mark.parametrize("option", [{"num_x0_samples": 3}, {"proposal": "gradient"}])
def test_zero_lambda_is_plain_sampling_also_with(option):
    """Draws of x0 have generators of their own, and a gradient times zero moves nothing."""
    policy = ARChain()
    plain = rollout(policy, policy.encode(["", ""]).repeat(3), sample_generators(0, 2, 3)).final
    result = run(policy, linear, ["", ""], num_particles=3, lmbda=0.0, schedule=1, **option)
    assert torch.equal(result.particles.data, plain)


@pytest.mark.parametrize(
    ("name", "resampling"),
    [*((name, "systematic") for name in POLICIES), *(("ar", name) for name in RESAMPLERS)],
)
def test_prompts_do_not_depend_on_their_neighbours(name, resampling):
    make, reward = POLICIES[name]
    prompts = ["0", "1", "-2"]

    def go(prompts, **more):
        return run(
            make(), reward, prompts, num_particles=5, lmbda=4.0, seed=3, schedule=1,
            resampling=resampling, ess_threshold=0.7, best_of_n=True, **more,
        )  # fmt: skip

    three = go(prompts)
    assert (three.ancestors != torch.arange(5)).any()
    assert_same_result(three, go([*prompts, "3"]), [0, 1, 2])
    assert_same_result(three, go(prompts[:1]), [0])
    for more in ({"max_batch": 1}, {"max_batch": 10}, {"max_batch": 1000}, {"decode_batch": 4}):
        split = go(prompts, **more)
        assert_same_result(three, split)
        assert torch.equal(three.best_of_n.particles.data, split.best_of_n.particles.data)
        assert torch.equal(three.best_of_n.best, split.best_of_n.best)
        assert split.steps == three.steps
        assert split.samples.prompts == prompts


def test_batches_are_no_larger_than_asked():
    policy, sizes = ARChain(), []
    policy.law = lambda x, i, c: sizes.append(len(x)) or ARChain.law(policy, x, i, c)
    run(policy, linear, ["0"] * 5, num_particles=4, schedule=1, max_batch=8, decode_batch=3)
    assert max(sizes) == 8 and min(sizes) == 4
    assert max(policy.decoded) == 3


@pytest.mark.parametrize("proposal", ["policy", "gradient"])
def test_each_prompt_has_its_own_law(many, proposal):
    """Prior N(c, 1) and reward -(x - c - 1)^2 / 2 both depend on the prompt c."""

    def reward(samples):
        goal = torch.tensor([float(p) + 1 for p in samples.prompts])
        return -((samples.data[:, 0] - goal) ** 2) / 2

    centres = [-3.0, 0.0, 5.0]
    result = run(
        ARChain(), reward, [str(c) for c in centres] * 200, num_particles=6, lmbda=2.0, schedule=1,
        ess_threshold=0.9, proposal=proposal,
    )  # fmt: skip
    assert ((result.ancestors >= 0) & (result.ancestors < 6)).all()
    log_z = -0.5 * math.log(3) - 1 / 3
    for j, c in enumerate(centres):
        assert_normal(result, c + 2 / 3, 1 / 3, log_z, slice(j, None, 3))


def test_one_prompt_resamples_while_another_does_not():
    def reward(samples):
        strength = torch.tensor([float(p) for p in samples.prompts])
        return strength * (samples.data[:, 0] - strength)

    result = run(
        ARChain(), reward, ["9", "0"], num_particles=6, lmbda=1.0, schedule=1, ess_threshold=0.5
    )
    identity = torch.arange(6)
    assert (result.ancestors[:, 1] == identity).all()
    assert (result.ancestors[:, 0] != identity).any()
    assert result.roots[1] == 6 > result.roots[0]
    alone = run(ARChain(), reward, ["9"], num_particles=6, lmbda=1.0, schedule=1, ess_threshold=0.5)
    assert_same_result(result, alone, [0])


# Shifts and extreme rewards -----------------------------------------------------------------


def rounded(samples):
    """x on a grid of 1 / 16, so that adding an integer is exact in float32."""
    return (samples.data[:, 0] * 16).round() / 16


@pytest.mark.parametrize("tempering", [*TEMPERING, "adaptive"])
@pytest.mark.parametrize("potential", POTENTIALS)
def test_reward_shift_changes_log_z_alone(potential, tempering):
    options = dict(
        num_particles=6, lmbda=4.0, potential=potential, tempering=tempering, schedule=1,
        ess_threshold=0.8,
    )  # fmt: skip
    plain = run(ARChain(4, 0.8), rounded, ["0", "1"], **options)
    for c in (8, -1000):
        shifted = run(ARChain(4, 0.8), lambda s, c=c: rounded(s) + c, ["0", "1"], **options)
        assert torch.equal(shifted.ancestors, plain.ancestors)
        assert torch.equal(shifted.particles.data, plain.particles.data)
        torch.testing.assert_close(shifted.log_z, plain.log_z + 4.0 * c, rtol=0, atol=1e-8)
        torch.testing.assert_close(shifted.ess, plain.ess, rtol=1e-8, atol=0)
    if potential != "none":
        assert (plain.ancestors != torch.arange(6)).any()


@pytest.mark.parametrize("potential", POTENTIALS)
@pytest.mark.parametrize("offset", [-1e3, 0.0, 1e3])
def test_rewards_of_a_thousand(potential, offset):
    """exp(10 * 1000) is no float64; half of the particles have all of the weight."""
    result = run(
        TwoPointChain(3), lambda s: 1e3 * s.data[:, 0].double() + offset, ["0"] * 20,
        num_particles=8, lmbda=10.0, potential=potential, schedule=1,
    )  # fmt: skip
    assert result.log_z.isfinite().all() and (result.ess >= 1).all()
    alive = torch.isfinite(result.log_weights).all()
    assert alive
    ones = by_prompt(result, result.particles.data[:, 0]).double()
    # without a flip the bit drawn first stays; a prompt has a 1 with probability 1 - 2^-8
    has_one = (ones == 1).any(1)
    share = (result.log_weights.softmax(1) * ones).sum(1)
    torch.testing.assert_close(share, has_one.double())
    # log Z = log(share of ones at the start) + lambda (1000 + offset)
    share = (result.log_z - 10 * (1e3 + offset)).exp()[has_one]
    torch.testing.assert_close(share * 8, (share * 8).round(), atol=1e-6, rtol=0)


@pytest.mark.parametrize("ess_threshold", THRESHOLDS)
@pytest.mark.parametrize("potential", POTENTIALS)
def test_minus_infinity_is_a_hard_constraint(many, potential, ess_threshold):
    """r = log P(token 0 is not 1): -inf only where that is certain, so no future is cut off."""

    def reward(samples):
        p = samples.data
        if p.is_floating_point():
            return (1 - p[:, 0, 1]).clamp(min=0).log()
        return torch.where(p[:, 0] == 1, -torch.inf, 0.0)

    policy = MaskedChain()
    states, probs = policy.enumerate()
    ok = states[:, 0] != 1
    conditional = probs * ok / probs[ok].sum()
    log_z = probs[ok].sum().log()
    result = run(
        policy, reward, [""] * 600, num_particles=4, lmbda=1.0, potential=potential, schedule=1,
        ess_threshold=ess_threshold,
    )  # fmt: skip
    tokens, weights = result.particles.data, result.log_weights.exp()
    assert (weights[by_prompt(result, tokens[:, 0]) == 1] == 0).all()
    assert_unbiased(result, torch.ones(len(tokens)), 1.0, log_z)
    for position, value in ((0, 0), (1, 0), (2, 2)):
        share = conditional[states[:, position] == value].sum()
        assert_unbiased(result, (tokens[:, position] == value).double(), share, log_z)


@pytest.mark.parametrize("potential", POTENTIALS)
def test_minus_infinity_on_the_way_is_no_verdict_without_resampling(many, potential):
    """Half-line constraint: predictions cross it back and forth; unresampled, the law is exact."""
    reward = lambda s: torch.where(s.data[:, 0] > 0, 0.0, -torch.inf)  # noqa: E731
    result = run(
        ARChain(), reward, [""] * 400, num_particles=8, lmbda=3.0, potential=potential,
        ess_threshold=0.0, schedule=1,
    )  # fmt: skip
    x = result.particles.data[:, 0]
    assert not result.log_weights.isnan().any()
    assert_unbiased(result, torch.ones_like(x), 1.0, math.log(0.5))
    assert_unbiased(result, x, math.sqrt(2 / math.pi), math.log(0.5))


@pytest.mark.parametrize("ess_threshold", THRESHOLDS)
@pytest.mark.parametrize("potential", POTENTIALS)
@pytest.mark.parametrize("tempering", [*TEMPERING, "adaptive"])
def test_a_whole_prompt_at_minus_infinity(potential, ess_threshold, tempering):
    """One prompt is dead for good, one until its last step, one lives: no crash, no mixing."""

    def reward(samples):
        final = not samples.data.is_floating_point()
        p = samples.data if not final else torch.nn.functional.one_hot(samples.data, 3).double()
        value = p[:, 0, 0] + p[:, 1, 1]
        dead = [name == "dead" or (name == "late" and not final) for name in samples.prompts]
        return torch.where(torch.tensor(dead), -torch.inf, value)

    options = dict(
        num_particles=4, lmbda=2.0, potential=potential, ess_threshold=ess_threshold,
        tempering=tempering, schedule=1,
    )  # fmt: skip
    result = run(MaskedChain(), reward, ["alive", "dead", "late"], **options)
    assert result.log_z[1] == -math.inf
    assert (result.log_weights[1] == -math.inf).all()
    assert (result.ancestors[:, 1:] == torch.arange(4)).all()
    assert result.log_z[[0, 2]].isfinite().all()
    scores = result.scores.value.double().view(3, 4)
    torch.testing.assert_close(result.log_weights[2], 2.0 * scores[2])
    assert len(result.samples) == 3
    assert_same_result(result, run(MaskedChain(), reward, ["alive"], **options), [0])


@pytest.mark.parametrize(
    "options", [{"lmbda": 0.0}, {"lmbda": 2.0, "tempering": lambda fraction: 0.0}]
)
def test_zero_times_minus_infinity_is_zero(options):
    """With lambda 0, at the end or on the way, a forbidden sample is like any other."""
    reward = lambda s: torch.where(s.data[:, 0] > 0, 0.0, -torch.inf)  # noqa: E731
    result = run(ARChain(), reward, ["0"], num_particles=16, schedule=1, **options)
    assert (result.ancestors == torch.arange(16)).all() and (result.ess[:-1] == 16).all()
    forbidden = result.scores.value.view(1, 16) == -math.inf
    assert forbidden.any() and not forbidden.all()
    dead = forbidden & (options["lmbda"] != 0)
    assert torch.equal(result.log_weights, torch.where(dead, -math.inf, 0.0).double())


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("when", ["first", "intermediate", "final"])
def test_nan_raises_and_names_the_sample(value, when):
    def reward(samples):
        out = samples.data.double().flatten(1).sum(1)
        late = not samples.data.is_floating_point()
        if (when == "final" and late) or (when == "first" and not late):
            out[-1] = value
        if when == "intermediate" and len(samples) > 2:
            out[4] = value
        return out

    name = {"first": r"sample 1 \('a'\)", "intermediate": r"sample 4 \('b'\)"}.get(
        when, r"sample 5 \('b'\)"
    )
    policy = MaskedChain()
    with pytest.raises(ValueError, match=f"{'nan' if value != value else 'inf'} to {name}"):
        run(policy, reward, ["a", "b"], num_particles=3, schedule=[2])
    assert policy.calls == {"first": 1}.get(when, 3)


# Several draws of x0 ------------------------------------------------------------------------


def test_lambda_is_inside_the_mean():
    """ESS at the first selection is that of the exact twist log E[exp(lambda r(x_T)) | x_0].

    r = -(x - 1)^2 / 2 and x_T | x_0 ~ N(m, v), so that the twist is
    -0.5 log(1 + lambda v) - lambda (m - 1)^2 / (2 (1 + lambda v)).
    """
    lmbda, k, policy = 6.0, 8, ARChain(4, 0.8)
    options = dict(num_particles=k, lmbda=lmbda, schedule=[0], ess_threshold=0.0)
    result = run(policy, quadratic, ["0"] * 4, num_x0_samples=500, **options)
    x = policy.initial(policy.encode(["0"] * 4).repeat(k), sample_generators(0, 4, k))
    law = policy.law(x, 0, policy.encode(["0"] * 4 * k))
    m, v = law.x0[:, 0], law.x0_std**2

    def ess(log_w):
        return 1 / log_w.view(4, k).softmax(1).square().sum(1)

    exact = -lmbda * (m - 1) ** 2 / (2 * (1 + lmbda * v))
    torch.testing.assert_close(result.ess[0], ess(exact), rtol=0.15, atol=0.15)
    plug_in = run(policy, quadratic, ["0"] * 4, **options)
    torch.testing.assert_close(plug_in.ess[0], ess(-lmbda * (m - 1) ** 2 / 2), rtol=1e-5, atol=0)
    outside = -lmbda * (m - 1) ** 2 / (2 * (1 + v))  # (mean of exp r)^lambda, the authors' code
    for wrong in (outside, -lmbda * (m - 1) ** 2 / 2):
        assert (ess(wrong) - ess(exact)).abs().max() > 1


@pytest.mark.parametrize("proposal", ["policy", "gradient"])
@pytest.mark.parametrize("potential", ["difference", "max", "sum"])
def test_law_with_several_draws(many, potential, proposal):
    lmbda = tilt(potential, 2.0)
    result = run(
        ARChain(), quadratic, [""] * 400, num_particles=6, lmbda=lmbda, potential=potential,
        num_x0_samples=4, schedule=1, ess_threshold=0.8, proposal=proposal,
    )  # fmt: skip
    log_z = -0.5 * math.log(1 + lmbda) - lmbda / (2 * (1 + lmbda))
    assert_normal(result, lmbda / (1 + lmbda), 1 / (1 + lmbda), log_z)


def test_exact_twist_keeps_ess_high(many):
    """On this chain `sample_x0` is exact: with many draws the weights hardly vary."""
    lmbda, p, k = 10.0, 50, 32
    log_z = -0.5 * math.log(1 + lmbda) - lmbda / (2 * (1 + lmbda))
    results = {
        n: run(
            ARChain(6, 0.7), quadratic, [""] * p, num_particles=k, lmbda=lmbda, schedule=1,
            ess_threshold=1.0, num_x0_samples=n,
        )
        for n in (1, 64)
    }  # fmt: skip
    # before the end, where one network call's worth of randomness is left whatever the twist
    ess = {n: r.ess[:-1].mean(1) / k for n, r in results.items()}
    assert ess[64].min() > 0.6 > 0.5 > ess[1].min()
    error = {n: (r.log_z - log_z).square().mean().sqrt() for n, r in results.items()}
    assert error[64] < 0.5 * error[1]


def test_draws_do_not_disturb_the_noise_of_particles():
    """With the same selections, the particles are the same: they own their generators."""
    options = dict(num_particles=4, lmbda=1.0, schedule=1, ess_threshold=0.0)
    one = run(ARChain(), linear, ["0", "1"], **options)
    several = run(ARChain(), linear, ["0", "1"], num_x0_samples=5, **options)
    assert torch.equal(one.particles.data, several.particles.data)
    assert not torch.equal(one.ess, several.ess)


def test_noise_resampling_and_draws_have_seeds_of_their_own(monkeypatch):
    seeds = []

    def spy(*args, **options):
        generators = sample_generators(*args, **options)
        seeds.append({g.initial_seed() for g in generators})
        return generators

    steer_with(spy, monkeypatch)
    run(ARChain(), linear, ["0", "1"], num_particles=3, num_x0_samples=2)
    assert sorted(map(len, seeds)) == [2, 6, 6]
    assert len(set.union(*seeds)) == 14


# Gradient-guided proposals ------------------------------------------------------------------


class Spy(ARChain):
    """Records the gradients its laws were shifted by."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.shifts = []

    def law(self, x, i, condition):
        law, shifts = super().law(x, i, condition), self.shifts

        class Law(NormalLaw):
            def shift(self, gradient):
                shifts.append(gradient)
                return super().shift(gradient)

            def take(self, indices):
                return Law(**vars(super().take(indices)))

        return Law(**vars(law))


def test_gradient_is_that_of_lambda_r(many):
    """r(x0) = x0_0 with x0 = a^(n/2) x: the mean moves by std^2 lambda a^(n/2), no other axis."""
    policy = Spy(4, 0.5, dim=2)
    run(policy, linear, [""], num_particles=5, lmbda=3.0, schedule=[1, 3], proposal="gradient",
        ess_threshold=1.0)  # fmt: skip
    assert len(policy.shifts) == 2
    for gradient, left in zip(policy.shifts, (3, 1), strict=True):
        expected = torch.tensor([3.0 * 0.5 ** (left / 2), 0.0], dtype=torch.float64)
        torch.testing.assert_close(gradient, expected.expand(5, 2))


def test_gradient_follows_its_particle():
    """After a selection each shift is the gradient at the particle the law belongs to."""

    class Checked(ARChain):
        def law(self, x, i, condition):
            law = super().law(x, i, condition)
            policy, r = self, math.sqrt(self.a) ** (self.num_steps - i)

            class Law(NormalLaw):
                def take(self, indices):
                    return Law(**vars(super().take(indices)))

                def shift(self, gradient):
                    policy.checked += 1
                    torch.testing.assert_close(gradient, 5.0 * -(self.x0 - 1) * r)
                    return super().shift(gradient)

            return Law(**vars(law))

    policy = Checked()
    policy.checked = 0
    result = run(policy, quadratic, ["0", "2"], num_particles=6, lmbda=5.0, schedule=1,
                 proposal="gradient", ess_threshold=1.0)  # fmt: skip
    assert policy.checked == 3 and (result.ancestors != torch.arange(6)).any()


@pytest.mark.parametrize("potential", POTENTIALS)
@pytest.mark.parametrize("clip", [0.05, 0.2])
def test_clipped_gradients_stay_exact(many, potential, clip):
    policy, lmbda = Spy(4, 0.5, dim=2), tilt(potential, 3.0)
    result = run(
        policy, quadratic, [""] * 400, num_particles=6, lmbda=lmbda, potential=potential,
        proposal="gradient", gradient_clip=clip, schedule=1, ess_threshold=0.7,
    )  # fmt: skip
    norms = torch.stack(policy.shifts).norm(dim=2)
    assert norms.max() <= clip * (1 + 1e-9)
    # the looser bound does not bind under the small lambda that "sum" gets
    assert norms.max() > 0.99 * clip or (clip, potential) == (0.3, "sum")
    log_z = -0.5 * math.log(1 + lmbda) - lmbda / (2 * (1 + lmbda))
    assert_normal(result, lmbda / (1 + lmbda), 1 / (1 + lmbda), log_z)


def test_a_useless_gradient_stays_exact(many):
    """The law does not depend on the gradient's quality: here its sign is wrong."""

    class Wrong(Spy):
        def law(self, x, i, condition):
            law = super().law(x, i, condition)
            law.x0 = 2 * law.x0.detach() - law.x0
            return law

    result = run(Wrong(), linear, [""] * 800, num_particles=8, lmbda=0.8, proposal="gradient",
                 schedule=1, ess_threshold=0.8)  # fmt: skip
    assert_normal(result, 0.8, 1.0, 0.32)


@pytest.mark.parametrize("tempering", ["linear", "adaptive"])
def test_gradient_with_tempering(many, tempering):
    lmbda, policy = 1.0, Spy()
    result = run(policy, linear, [""] * 400, num_particles=50, lmbda=lmbda, proposal="gradient",
                 schedule=1, ess_threshold=0.8, target_ess=0.8, tempering=tempering)  # fmt: skip
    if tempering == "linear":  # the guidance is tempered too
        torch.testing.assert_close(float(policy.shifts[0][0, 0]), 0.25 * 0.25)
        assert_normal(result, lmbda, 1.0, lmbda**2 / 2)
    weights, x = result.log_weights.softmax(1), by_prompt(result, result.particles.data[:, 0])
    assert float((weights * x).sum(1).mean()) == pytest.approx(lmbda, abs=0.05)


def test_gradient_helps(many):
    """A proposal that looks ahead: log Z varies less."""
    options = dict(num_particles=8, lmbda=2.0, schedule=1)
    errors = [
        float((run(ARChain(8, 0.8), linear, [""] * 200, proposal=p, **options).log_z - 2.0).std())
        for p in ("policy", "gradient")
    ]
    assert errors[1] < 0.7 * errors[0]


def test_gradients_that_are_not_finite(many):
    """Where the reward is -inf there is no direction; a NaN elsewhere is an error with a name."""

    def positive(samples):  # log of the positive part: -inf and a NaN gradient below 0
        x = samples.data[:, 0]
        return (x * (x > 0)).log()  # inf * 0 on the way back

    result = run(ARChain(), positive, [""] * 400, num_particles=8, lmbda=1.0, ess_threshold=0.0,
                 proposal="gradient", gradient_clip=0.5, schedule=1)  # fmt: skip
    # E[max(x, 0)] = 1 / sqrt(2 pi), and E[max(x, 0) x] = 1 / 2
    log_z, x = -0.5 * math.log(2 * math.pi), result.particles.data[:, 0]
    assert_unbiased(result, torch.ones_like(x), 1.0, log_z)
    assert_unbiased(result, x, 0.5 / math.exp(log_z), log_z)

    def root(samples):
        x = samples.data[:, 0]
        return (x - x.detach()[1]).abs().sqrt()  # 0 * inf in its second row

    with pytest.raises(ValueError, match=r"'root' gave sample 1 .*gradient"):
        run(ARChain(), root, [""], proposal="gradient", schedule=1)


def test_gradient_proposals_need_a_gradient():
    policy = ARChain()
    rigid = as_reward(linear, RewardInfo("rigid", differentiable=False))
    with pytest.raises(ValueError, match=r"gradient.*'rigid'"):
        run(policy, rigid, [""], proposal="gradient")
    assert policy.calls == 0

    def silent(samples):
        return samples.data[:, 0].detach()

    with pytest.raises(ValueError, match=r"gradient.*'silent'"):
        run(policy, silent, [""], proposal="gradient", schedule=1)
    assert policy.calls == 1


# Rewards that know their uncertainty --------------------------------------------------------


def unsure(samples):
    """The linear reward, the more uncertain the farther from 1; and another kind of it."""
    x = samples.data[:, 0]
    return Scores(x, (x - 1) ** 2 / 2)


def unsure_tokens(samples):
    p = samples.data
    p = p if p.is_floating_point() else torch.nn.functional.one_hot(p, 3).double()
    return Scores(token_reward(samples), p[:, 1, 0] + 2 * p[:, 2, 2])


@pytest.mark.parametrize("proposal", ["policy", "gradient"])
@pytest.mark.parametrize("ess_threshold", [None, 0.6])
@pytest.mark.parametrize("potential", POTENTIALS)
def test_intermediate_uncertainty_leaves_the_target(many, potential, ess_threshold, proposal):
    lmbda = tilt(potential, 1.0)
    options = dict(
        num_particles=6, lmbda=lmbda, potential=potential, ess_threshold=ess_threshold,
        proposal=proposal, schedule=1,
    )  # fmt: skip
    policy, prompts = ARChain(4, 0.8), [""] * 400
    result = run(policy, unsure, prompts, uncertainty="intermediate", **options)
    assert_normal(result, lmbda, 1.0, lmbda**2 / 2)
    plain = run(policy, linear, prompts, **options)
    assert potential == "none" or not torch.equal(result.ess[0], plain.ess[0])


@pytest.mark.parametrize("k", [2, 3, 16])
@pytest.mark.parametrize("tempering", ["constant", "linear", "adaptive"])
def test_intermediate_uncertainty_leaves_the_target_whatever_k_and_tempering(many, k, tempering):
    result = run(
        ARChain(), unsure, [""] * 600, num_particles=k, lmbda=0.8, schedule=1, ess_threshold=0.8,
        tempering=tempering, uncertainty="intermediate", kappa=7.0,
    )  # fmt: skip
    assert_normal(result, 0.8, 1.0, 0.32)


@pytest.mark.parametrize("proposal", ["policy", "gradient"])
@pytest.mark.parametrize("ess_threshold", [None, 0.6])
@pytest.mark.parametrize("potential", POTENTIALS)
def test_terminal_uncertainty_tilts_by_the_lower_bound(many, potential, ess_threshold, proposal):
    """x - kappa (x - 1)^2 / 2 tilts N(0, 1) to N((l + l kappa) / p, 1 / p), p = 1 + l kappa."""
    lmbda, kappa = tilt(potential, 1.0), 0.8
    result = run(
        ARChain(4, 0.8), unsure, [""] * 400, num_particles=6, lmbda=lmbda, potential=potential,
        ess_threshold=ess_threshold, proposal=proposal, schedule=1, uncertainty="terminal",
        kappa=kappa,
    )  # fmt: skip
    p, b = 1 + lmbda * kappa, lmbda + lmbda * kappa
    assert_normal(result, b / p, 1 / p, (b**2 / p - math.log(p) - lmbda * kappa) / 2)


@pytest.mark.parametrize("kappa", [None, 0.0, 0.7])
def test_enumerable_chain_with_uncertainty(many, kappa):
    """Against the enumerated law: of r with "intermediate" (None), else of r - kappa s."""

    def target(samples):
        scores = unsure_tokens(samples)
        return scores.value - (kappa or 0.0) * scores.std

    mode = {"uncertainty": "intermediate"} if kappa is None else {"uncertainty": "terminal"}
    mode["kappa"] = kappa or 0.0
    policy = MaskedChain()
    states, log_z, law = tilted(policy, target, 0.8)
    for potential in ("difference", "running_max"):
        result = run(
            policy, unsure_tokens, [""] * 1000, num_particles=4, lmbda=0.8, schedule=1,
            potential=potential, ess_threshold=0.7, **mode,
        )  # fmt: skip
        assert_unbiased(result, torch.ones(4000), 1.0, log_z)
        common = law > 0.02  # the other cells are hit too rarely for normal errors
        assert common.sum() >= 5
        for state, share in zip(states[common], law[common], strict=True):
            here = (result.particles.data == state).all(1).double()
            assert_unbiased(result, here, share, log_z)


@pytest.mark.parametrize("proposal", ["policy", "gradient"])
@pytest.mark.parametrize("options", [{"uncertainty": "intermediate"}, {"uncertainty": "terminal"}])
def test_certain_rewards_are_steered_by_as_ever(options, proposal):
    def certain(samples):
        return Scores(linear(samples), torch.zeros(len(samples)))

    shared = dict(num_particles=5, schedule=1, proposal=proposal, lmbda=1.0, best_of_n=True)
    identical = make_reward({"uncertain": {"reward": [as_reward(linear)] * 3}})
    for plain, reward in ((linear, certain), (identical, identical)):
        expected = run(ARChain(), plain, ["", "0.5"], ess_threshold=None, **shared)
        result = run(ARChain(), reward, ["", "0.5"], ess_threshold=None, **shared, **options)
        assert_same_result(result, expected)
        assert torch.equal(result.best_of_n.scores.value, expected.best_of_n.scores.value)
    assert (result.ancestors != torch.arange(5)).any()
    off = run(ARChain(), unsure, [""], **shared)  # nobody asked
    assert_same_result(off, run(ARChain(), linear, [""], **shared))


@pytest.mark.parametrize("schedule", [[3], [0]])
@pytest.mark.parametrize("mode", ["intermediate", "terminal"])
def test_a_reward_without_a_std_is_found_at_the_first_step(mode, schedule):
    policy = ARChain()
    with pytest.raises(ValueError, match=f"uncertainty='{mode}' needs.*'linear' gave none"):
        run(policy, linear, ["", "1"], schedule=schedule, uncertainty=mode)
    assert policy.calls == 1


def test_scores_of_a_lower_bound():
    result = run(ARChain(), unsure, ["0", "2"], uncertainty="terminal", kappa=2.0, best_of_n=True)
    for found in (result, result.best_of_n):
        x = found.particles.data[:, 0].float()
        torch.testing.assert_close(found.scores.parts["reward"], x)
        torch.testing.assert_close(found.scores.std, (x - 1) ** 2 / 2)
        torch.testing.assert_close(found.scores.value, x - (x - 1) ** 2)
        assert torch.equal(found.best, found.scores.value.view(2, 4).argmax(1))


@pytest.mark.parametrize("proposal", ["policy", "gradient"])
def test_terminal_uncertainty_is_the_lower_bound_as_a_reward(proposal):
    """Its gradient is of both."""

    def bound(samples):
        scores = unsure(samples)
        return scores.value.float() - 0.8 * scores.std.float()

    shared = dict(num_particles=5, lmbda=1.0, schedule=1, proposal=proposal)
    found = run(ARChain(), unsure, ["", "1"], uncertainty="terminal", kappa=0.8, **shared)
    assert_same_result(found, run(ARChain(), bound, ["", "1"], **shared))


def test_several_draws_of_a_lower_bound(many):
    """Lambda stays inside the mean."""
    result = run(
        ARChain(4, 0.8), unsure, [""] * 400, lmbda=1.0, schedule=1, num_x0_samples=3,
        uncertainty="terminal", kappa=0.8, ess_threshold=0.6,
    )  # fmt: skip
    assert_normal(result, 1.0, 1 / 1.8, (1.8 - math.log(1.8) - 0.8) / 2)


def test_shrunk_rewards():
    r = torch.tensor([[1.0, 2.0, 6.0], [0.0, 0.0, 0.0], [5.0, -math.inf, 7.0]]).double()
    s = torch.tensor([[0.0, math.sqrt(7), 1e9], [1.0, 0.0, 2.0], [math.sqrt(2), 0.0, 0.0]]).double()
    found = shrink(r, s)
    # means 3, 0 and 6, variances 7, 0 and 2
    expected = torch.tensor([[1.0, 2.5, 3.0], [0.0, 0.0, 0.0], [5.5, -math.inf, 7.0]]).double()
    torch.testing.assert_close(found, expected)
    assert torch.equal(found[s == 0], r[s == 0])
    torch.testing.assert_close(shrink(1000 - 3 * r[:2], 3 * s[:2]), 1000 - 3 * found[:2])
    alone, dead = r[:, :1], torch.full((1, 3), -math.inf, dtype=torch.float64)
    assert torch.equal(shrink(alone, s[:, 1:2]), alone)
    assert torch.equal(shrink(dead, s[1:2]), dead)
    # between the reward and the mean, and nearer to it with more std
    last = r[:1]
    for scale in (0.1, 1.0, 10.0):
        now = shrink(r[:1], torch.full((1, 3), scale).double())
        assert ((now - 3).abs() < (last - 3).abs()).all() and ((now - 3) * (r[:1] - 3) > 0).all()
        last = now


def test_uncertainty_of_one_prompt_does_not_reach_another():
    options = dict(schedule=1, uncertainty="intermediate", lmbda=1.0, num_particles=5)
    together = run(ARChain(), unsure, ["0", "40", "-3"], **options)
    alone = run(ARChain(), unsure, ["0"], **options)
    assert_same_result(together, alone, rows=[0])


def test_hard_constraint_with_uncertainty(many):
    """As without: -inf counts for nothing in the mean, and does not make the others -inf."""

    def reward(samples):
        p = samples.data
        p = p if p.is_floating_point() else torch.nn.functional.one_hot(p, 3).double()
        return Scores((1 - p[:, 0, 1]).clamp(min=0).log(), (p[:, 0, 1] < 1) * p[:, 1, 0])

    policy = MaskedChain()
    states, probs = policy.enumerate()
    ok = states[:, 0] != 1
    conditional, log_z = probs * ok / probs[ok].sum(), probs[ok].sum().log()
    result = run(
        policy, reward, [""] * 600, num_particles=4, lmbda=1.0, schedule=1, ess_threshold=0.7,
        uncertainty="intermediate",
    )  # fmt: skip
    tokens = result.particles.data
    assert_unbiased(result, torch.ones(len(tokens)), 1.0, log_z)
    for position, value in ((0, 0), (1, 0), (2, 2)):
        share = conditional[states[:, position] == value].sum()
        assert_unbiased(result, (tokens[:, position] == value).double(), share, log_z)


# User-defined parts -------------------------------------------------------------------------


def test_user_defined_potential(many):
    """Any functional of the history gives the same law: here the mean of the last two rewards."""
    widths = []

    def recent(history):
        widths.append(history.shape[1])
        return history[:, -2:].mean(1)

    result = run(ARChain(), linear, [""] * 400, num_particles=6, lmbda=0.8, potential=recent,
                 schedule=1, ess_threshold=0.9)  # fmt: skip
    assert widths == [1, 2, 3]
    assert_normal(result, 0.8, 1.0, 0.32)
    assert (result.ancestors != torch.arange(6)).any()


def test_user_defined_potential_of_a_wrong_shape():
    with pytest.raises(ValueError, match=r"potential.*\(8, 1\).*expected \(8,\)"):
        run(ARChain(), linear, ["", ""], potential=lambda history: history)


@pytest.mark.parametrize("modality", ["toy", "dna", "something else"])
def test_user_defined_policy_of_any_modality(many, modality):
    """A fair die, rolled in one step, as strings of one letter: Samples.data may be a list."""

    class Die(Toy):
        def initial(self, condition, generator=None):
            return torch.zeros(len(condition), 1, dtype=torch.int64)

        def law(self, x, i, condition):
            probs = torch.full((len(x), 1, 6), 1 / 6, dtype=torch.float64)
            return CategoricalLaw(probs, probs)

        def decode(self, x0, condition):
            samples = super().decode(x0, condition)
            if x0.is_floating_point():
                return samples
            samples.data = ["abcdef"[int(v)] for v in x0[:, 0]]
            return samples

    def reward(samples):
        if isinstance(samples.data, list):
            return torch.tensor([float("abcdef".index(v)) for v in samples.data])
        return samples.data[:, 0] @ torch.arange(6.0).double()

    policy = Die(1)
    policy.modality = modality
    result = run(policy, reward, [""] * 500, num_particles=4, lmbda=0.5)
    assert result.samples.modality == modality
    law = (0.5 * torch.arange(6.0)).softmax(0)
    log_z = math.log(sum(math.exp(0.5 * v) for v in range(6)) / 6)
    for face, prob in enumerate(law):
        hit = torch.tensor([v == "abcdef"[face] for v in result.particles.data])
        assert_unbiased(result, hit.double(), prob, log_z)


def test_inputs_reach_encode():
    class Conditioned(ARChain):
        def law(self, x, i, condition):
            assert torch.equal(condition.tensors["flag"], condition.tensors["centre"] + 1)
            return super().law(x, i, condition)

    flag = torch.tensor([[1.0], [3.0]], dtype=torch.float64)
    result = run(Conditioned(), linear, ["0", "2"], inputs={"flag": flag}, max_batch=4)
    assert len(result.particles) == 8


# Bad input ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"potential": "diference"}, r"unknown potential.*difference"),
        ({"resampling": "sistematic"}, r"unknown resampling.*systematic"),
        ({"tempering": "adaptativ"}, r"unknown tempering.*adaptive"),
        ({"proposal": "gradent"}, r"unknown proposal.*gradient"),
        ({"num_particles": 0}, r"num_particles.*-?0"),
        ({"num_particles": -3}, r"num_particles.*-3"),
        ({"lmbda": math.nan}, "lmbda must be finite"),
        ({"lmbda": -math.inf}, "lmbda must be finite"),
        ({"ess_threshold": 1.5}, r"ess_threshold.*1\.5"),
        ({"ess_threshold": math.nan}, r"ess_threshold.*nan"),
        ({"target_ess": -0.1}, r"target_ess.*-0\.1"),
        ({"schedule": 0}, r"schedule.*0"),
        ({"schedule": [1, 4]}, r"schedule.*0\.\.3.*4"),
        ({"schedule": [-1]}, r"schedule.*-1"),
        ({"schedule": [0.5, 1.5]}, r"schedule.*1\.5"),
        ({"schedule": [0.0]}, r"schedule.*0\.0"),
        ({"schedule": [0.5, 2]}, r"schedule.*0\.5"),
        ({"schedule": [math.nan]}, r"schedule.*nan"),
        ({"num_x0_samples": 0}, r"num_x0_samples.*0"),
        ({"uncertainty": "terminol"}, r"unknown uncertainty.*did you mean 'terminal'"),
        ({"uncertainty": "terminal", "kappa": -0.1}, r"kappa.*reward uncertainty.*-0\.1"),
        ({"kappa": math.nan}, r"kappa.*nan"),
        ({"uncertainty": "intermediate", "num_x0_samples": 3}, r"one clean prediction.*=3 came"),
        ({"max_batch": 0}, r"max_batch.*0"),
        ({"decode_batch": -1}, r"decode_batch.*-1"),
        ({"gradient_clip": 0.0}, r"gradient_clip.*0"),
        ({"gradient_clip": -1.0}, r"gradient_clip.*-1"),
        ({"gradient_clip": math.nan}, r"gradient_clip.*nan"),
        ({"gradient_clip": math.inf}, r"gradient_clip.*inf"),
        ({"prompts": []}, "no prompts"),
        ({"reward": "clip_scor"}, r"no reward 'clip_scor'"),
    ],
)
def test_bad_options_are_refused_before_compute(options, message):
    policy = ARChain()
    arguments = {"reward": linear, "prompts": [""], **options}
    with pytest.raises(ValueError, match=message):
        run(policy, **arguments)
    assert policy.calls == 0


@pytest.mark.parametrize(
    ("reward", "error", "message"),
    [
        (lambda s: s.data, ValueError, r"shape \(2, 1\), expected \(2,\)"),
        (lambda s: s.data.mean(), ValueError, r"shape \(\)"),
        (lambda s: s.data[:1, 0], ValueError, r"shape \(1,\)"),
        (lambda s: (s.data[:, 0] > 0).long(), TypeError, "int64"),
        (lambda s: s.data[:, 0].tolist(), TypeError, "list"),
        (lambda s: None, TypeError, "NoneType"),
    ],
)
@pytest.mark.parametrize("schedule", [[3], [0]])
def test_a_bad_reward_is_found_at_the_first_step(reward, error, message, schedule):
    policy = ARChain()
    with pytest.raises(error, match=message if schedule == [3] else message[:8]):
        run(policy, reward, ["", "1"], schedule=schedule)
    assert policy.calls == 1


@pytest.mark.parametrize("schedule", [[2], [0]])
def test_what_a_law_cannot_do_is_found_at_the_first_step(schedule):
    policy = MaskedChain()
    with pytest.raises(ValueError, match=r"sample_x0.*CategoricalLaw"):
        run(policy, token_reward, [""], schedule=schedule, num_x0_samples=2)
    assert policy.calls == 1
    with pytest.raises(ValueError, match=r"gradient.*torch\.int64"):
        run(policy, token_reward, [""], schedule=schedule, proposal="gradient")
    assert policy.calls == 1  # none more
    policy = POLICIES["mixture"][0]()
    with pytest.raises(ValueError, match=r"shift.*MixtureLaw"):
        run(policy, linear, [""], schedule=schedule, proposal="gradient")
    assert policy.calls == 1


def test_a_deterministic_policy_is_refused():
    policy = ARChain()
    policy.stochastic = False
    with pytest.raises(ValueError, match=r"deterministic.*eta"):
        run(policy, linear, [""])
    assert policy.calls == 0
    assert len(run(policy, linear, [""], num_particles=1).particles) == 1


# Schedules, triggers, results ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("schedule", "num_steps", "expected"),
    [
        (None, 100, [20, 40, 60, 80]),
        (None, 10, [2, 4, 6, 8]),
        (None, 4, [1, 2]),
        (None, 1, []),
        (1, 4, [0, 1, 2]),
        (2, 8, [1, 3, 5]),
        (50, 8, []),
        (1, 1, []),
        ([], 8, []),
        ([5, 1, 5], 8, [1, 5]),
        ([7], 8, [7]),
        ([0.5], 8, [4]),
        ([0.99, 0.01], 8, [0, 7]),
    ],
)
def test_schedule(schedule, num_steps, expected):
    assert FeynmanKac(schedule=schedule).steps(num_steps) == expected


@pytest.mark.parametrize("schedule", [None, 1, [0, 3], [0.5], []])
def test_shapes_of_a_result(schedule):
    policy = ARChain(6)
    result = run(policy, linear, ["0", "1", "2"], num_particles=5, schedule=schedule, lmbda=1.0)
    h = len(result.steps)
    assert result.ancestors.shape == (h, 3, 5) and result.ancestors.dtype == torch.int64
    assert result.ess.shape == (h + 1, 3) and result.lmbdas.shape == (h, 3)
    assert result.log_weights.shape == (3, 5)
    assert result.log_z.shape == result.roots.shape == result.best.shape == (3,)
    assert len(result.particles) == len(result.scores) == 15
    assert result.samples.prompts == ["0", "1", "2"]
    assert policy.decoded.count(15) == h + 1 and policy.calls == 6
    assert result.best_of_n is None


def test_a_single_prompt_and_the_defaults():
    result = run(ARChain(10), linear, "0.5")
    assert result.steps == [2, 4, 6, 8]
    assert result.log_weights.shape == (1, 4) and result.samples.prompts == ["0.5"]


def test_threshold_semantics():
    def go(threshold):
        return run(ARChain(6), linear, [str(v) for v in range(12)], num_particles=5, lmbda=1.5,
                   schedule=1, ess_threshold=threshold)  # fmt: skip

    identity = torch.arange(5)
    always, never, half = go(1.0), go(0.0), go(0.7)
    assert_same_result(always, go(None))
    assert (never.ancestors == identity).all() and (never.roots == 5).all()
    expected = 1.5 * never.scores.value.double().view(12, 5)
    torch.testing.assert_close(never.log_weights, expected)
    moved = (half.ancestors != identity).any(2)
    low = half.ess[:-1] <= 0.7 * 5
    assert low.any() and (~low).any()
    assert not (moved & ~low).any()  # only where ESS was low
    assert (moved & low).sum() >= 0.9 * low.sum()  # systematic may draw the identity by chance


def test_best_particles_and_scores():
    result = run(MaskedChain(), token_reward, ["a", "b"], num_particles=6, lmbda=0.5, schedule=1)
    torch.testing.assert_close(result.scores.value, token_reward(result.particles).float())
    value = result.scores.value.view(2, 6)
    assert torch.equal(result.best, value.argmax(1))
    chosen = result.particles.data.view(2, 6, -1)[torch.arange(2), result.best]
    assert torch.equal(result.samples.data, chosen)


def test_scores_keep_std_and_parts():
    def reward(samples):
        x = samples.data[:, 0]
        return Scores(x, std=x.abs(), parts={"square": x**2})

    for max_batch in (None, 4):
        result = run(ARChain(), reward, ["0", "1"], lmbda=1.0, max_batch=max_batch)
        x = result.particles.data[:, 0].float()
        torch.testing.assert_close(result.scores.std, x.abs())
        torch.testing.assert_close(result.scores.parts["square"], x**2)


@pytest.mark.parametrize("num_x0_samples", [1, 3])
def test_best_of_n_has_the_same_noise_and_the_same_compute(num_x0_samples):
    policy, k = ARChain(), 4
    prompts = ["0", "1", "2"]
    result = run(policy, linear, prompts, num_particles=k, lmbda=2.0, schedule=1, seed=5,
                 best_of_n=True, num_x0_samples=num_x0_samples, ess_threshold=1.0)  # fmt: skip
    assert policy.calls == 2 * policy.num_steps
    baseline = result.best_of_n
    plain = rollout(policy, policy.encode(prompts).repeat(k), sample_generators(5, 3, k)).final
    assert torch.equal(baseline.particles.data, plain)
    assert torch.equal(baseline.best, plain[:, 0].view(3, k).argmax(1))
    assert torch.equal(baseline.samples.data[:, 0], plain[:, 0].view(3, k).amax(1))
    torch.testing.assert_close(baseline.scores.value, plain[:, 0].float())
    without = run(policy, linear, prompts, num_particles=k, lmbda=2.0, schedule=1, seed=5,
                  num_x0_samples=num_x0_samples, ess_threshold=1.0)  # fmt: skip
    assert_same_result(result, without)


@pytest.mark.parametrize("k", [1, 4])
def test_roots_and_the_collapse_warning(k):
    """Roots follow from the ancestors; the warning comes exactly when a prompt has one."""

    def reward(samples):
        return torch.tensor([float(p) for p in samples.prompts]) * samples.data[:, 0]

    seen = set()
    for prompts in (["0", "0.1"], ["0", "2"], ["0", "4"], ["0", "8"], ["0", "50"]):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            result = run(ARChain(4, 0.8), reward, prompts, num_particles=k, lmbda=1.0, schedule=1)
        for p in range(2):
            root = torch.arange(k)
            for ancestors in result.ancestors[:, p]:
                root = root[ancestors]
            assert result.roots[p] == len(root.unique())
        collapsed = k > 1 and int(result.roots[1]) == 1
        seen.add(int(result.roots[1]))
        assert len(caught) == collapsed
        if collapsed:
            message = str(caught[0].message)
            assert "for 1 of 2 prompts" in message and repr(prompts[1]) in message
    assert seen == {1} if k == 1 else {1, 2, 4} <= seen


# Lineage ------------------------------------------------------------------------------------

# log G at one selection from the rewards so far along a lineage: the paper's table, lambda left out
PAPER = {
    "difference": lambda r: r[-1] - (r[-2] if len(r) > 1 else 0),
    "max": lambda r: max(r),
    "sum": lambda r: sum(r),
    "running_max": lambda r: max(r) - (max(r[:-1]) if len(r) > 1 else 0),
    "none": lambda r: 0.0,
}


@pytest.mark.parametrize("ess_threshold", [1.0, 0.6])
@pytest.mark.parametrize("potential", POTENTIALS)
def test_product_of_potentials_along_each_lineage(potential, ess_threshold):
    """Replay of the run from the rewards given and the ancestors, by the paper's formulas."""
    p, k, lmbda, rewards = 3, 6, 3.0, []

    def recorded(samples):
        value = linear(samples).float()
        if len(samples) == p * k:
            rewards.append(value.double().view(p, k).tolist())
        return value

    result = run(ARChain(6, 0.8), recorded, ["0", "1", "-1"], num_particles=k, lmbda=lmbda,
                 potential=potential, ess_threshold=ess_threshold, schedule=1)  # fmt: skip
    h = len(result.steps)
    assert len(rewards) == h + 1
    resampled = 0
    for row in range(p):
        lineage = [[] for _ in range(k)]  # rewards met
        total, log_w, log_z = [0.0] * k, [0.0] * k, 0.0
        for step in range(h):
            for j in range(k):
                lineage[j].append(rewards[step][row][j])
                log_g = lmbda * PAPER[potential](lineage[j])
                total[j] += log_g
                log_w[j] += log_g
            weights = torch.tensor(log_w, dtype=torch.float64)
            ess = float(1 / weights.softmax(0).square().sum())
            assert ess == pytest.approx(float(result.ess[step, row]), rel=1e-9)
            ancestors = result.ancestors[step, row].tolist()
            if ess <= ess_threshold * k and potential != "none":
                resampled += 1
                log_z += float(weights.logsumexp(0)) - math.log(k)
                lineage, total = ([list[a] for a in ancestors] for list in (lineage, total))
                lineage, log_w = [list(r) for r in lineage], [0.0] * k
            else:
                assert ancestors == list(range(k))
        for j in range(k):
            log_g0 = lmbda * rewards[h][row][j] - total[j]  # the terminal correction
            log_w[j] += log_g0
        log_w = torch.tensor(log_w, dtype=torch.float64)
        torch.testing.assert_close(result.log_weights[row], log_w, rtol=1e-9, atol=1e-9)
        log_z += float(log_w.logsumexp(0)) - math.log(k)
        assert float(result.log_z[row]) == pytest.approx(log_z, abs=1e-9)
    assert resampled > 0 or potential == "none"
    # the terminal reward is that of what is returned
    assert rewards[h] == result.scores.value.double().view(p, k).tolist()
    assert torch.equal(result.scores.value, linear(result.particles).float())


def test_functions_are_taken_for_names_only_where_they_can_be():
    from diffreward.steering.walk import named

    with pytest.raises(ValueError, match="unknown resampling scheme"):
        named({"systematic": None}, len, "resampling scheme")
    assert named({}, len, "potential", or_function=True) is len
