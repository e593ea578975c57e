"""Feynman-Kac steering: sample from p(x) exp(lambda r(x)) / Z with particles, without training.

Singhal et al. 2025, *A General Framework for Inference-time Scaling and Steering of Diffusion
Models*, arXiv:2501.06848, Algorithm 1; gradient-guided proposals as in TDS, Wu et al. 2023,
arXiv:2306.17775. K particles per prompt run down the chain together; at scheduled steps the clean
predictions are scored, particles are reweighted by a *potential* and, when their weights have
become too uneven, resampled.

paper                 code                       meaning
k                     ``num_particles``          particles per prompt
lambda                ``lmbda``                  nats per unit of reward
r_phi(x_t)            ``history[:, h]``          reward of the clean prediction, ``law.x0``
prod of G_T .. G_t    ``exp(lambda_i * S_i)``    S_i = ``potential(history)``, a path functional
tau(x_t-1 | x_t)      ``proposal``               the policy's own law, or gradient-guided
t = T .. 0            i = 0 .. T-1               this package counts from noise to data

One step, ``i`` scheduled: take the law at x[i]; score its ``x0``; the weight since the last
resampling becomes exp(lambda_i S_i - base) times the proposals' p/tau; maybe resample x *and* law;
then draw x[i+1]. The potential never lags a step, and no network call is added. At the end the
weight takes lambda r(x[T]) in place of lambda_i S_i, so that whatever the potential, the product
is exp(lambda r) of the returned sample.

Rewards that know their standard deviation s may be followed with caution (``uncertainty``; ours):

terminal       r - kappa s in place of r throughout: the target is p exp(lambda (r - kappa s)) / Z
intermediate   on the way r + (1 - w) (mean - r), w = V / (V + s^2), mean and variance V those of
               the prompt's particles at that step; at the end r. Selection waits for predictions
               that can be judged. The target is unchanged, for every potential and every K: a
               weight is the ratio of two totals, the last total has no s in it, and the others
               may depend on all that was drawn before, other particles included.

Differences from the authors' code, which has each of these wrong (closed-form tests in
``tests/steering/test_feynman_kac.py``): weights are logarithms, and a skipped resampling keeps
them; ``max`` and ``sum`` get their terminal correction; the terminal reward is that of the
returned latents; lambda stands inside the log-mean-exp of many-sample rewards; prompts never mix.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from diffreward import smc
from diffreward.policy import Policy, sample_generators
from diffreward.rewards.base import (
    Reward,
    Scores,
    SetReward,
    as_reward,
    evaluate,
    make_reward,
    require_gradient,
)
from diffreward.samples import Samples
from diffreward.steering.result import BestOfN, SteeringResult, pick_best, warn_if_collapsed
from diffreward.steering.walk import (
    Walk,
    check_counts,
    check_law,
    check_policy,
    named,
    run_in_groups,
    scheduled_steps,
)

Potential = Callable[[Float[Tensor, "n h"]], Float[Tensor, " n"]]

POTENTIALS: dict[str, Potential] = {
    "difference": lambda history: history[:, -1],
    "max": lambda history: history.cummax(1).values.sum(1),
    "sum": lambda history: history.cumsum(1).sum(1),
    "running_max": lambda history: history.amax(1),
    "none": lambda history: torch.zeros_like(history[:, -1]),
}
"""Name -> S(history), where prod of G = exp(lambda S) and ``history`` holds the rewards at the
steps scored so far, oldest first, along each particle's own lineage.

``difference``: G = exp(lambda (r_i - r_before)). ``max``: each G = exp(lambda max so far), as in
the paper. ``sum``: each G = exp(lambda sum so far). ``running_max``: G = exp(lambda (max so far -
max before)). ``none``: plain importance sampling.
"""

TEMPERING: dict[str, Callable[[float], float]] = {
    "constant": lambda fraction: 1.0,
    "linear": lambda fraction: fraction,
}
"""Name -> lambda_i / lambda at the fraction of the chain done; "adaptive" is found by bisection."""


UNCERTAINTY = ("terminal", "intermediate")


@dataclass(frozen=True)
class FeynmanKac:
    """Hyper-parameters of Feynman-Kac steering; state lives in `Population`.

    Attributes:
        lmbda: tilt lambda, nats per unit of reward. The default suits rewards that spread by a few
            tenths, as ImageReward or a cosine do.
        potential: a name in `POTENTIALS`, or a function ``(n, h) -> (n,)`` of reward histories.
        tempering: a name in `TEMPERING`, "adaptive" (per prompt, lambda_i rises from the one before
            as far towards lambda as keeps ESS at ``target_ess * k``; it never falls, even if ESS
            is below that already), or a function of the fraction done.
        resampling: a scheme of `smc.RESAMPLERS`.
        ess_threshold: resample a prompt when ESS <= threshold * k; 1.0 and None resample at every
            scheduled step. ESS is never below 1, so that two particles are practically never
            resampled at 0.5: give 1.0 there.
        schedule: steps at which to score. None: at 20, 40, 60 and 80 % of the chain, the paper's;
            an int n: every n steps; a sequence of step indices, or of fractions in (0, 1). The end
            is always scored.
        target_ess: for adaptive tempering, as a fraction of k.
        uncertainty: "terminal" or "intermediate", see the module's text; None: standard deviations
            are ignored.
        kappa: of "terminal".

    Raises:
        ValueError: an unknown name, or a value out of range.
    """

    lmbda: float = 10.0
    potential: str | Potential = "difference"
    tempering: str | Callable[[float], float] = "constant"
    resampling: str = "systematic"
    ess_threshold: float | None = 0.5
    schedule: int | Sequence[int] | Sequence[float] | None = None
    target_ess: float = 0.5
    uncertainty: str | None = None
    kappa: float = 1.0

    def __post_init__(self) -> None:
        if not math.isfinite(self.lmbda):
            raise ValueError(f"lmbda must be finite, but {self.lmbda} came")
        named(POTENTIALS, self.potential, "potential", or_function=True)
        named({**TEMPERING, "adaptive": None}, self.tempering, "tempering", or_function=True)
        named(smc.RESAMPLERS, self.resampling, "resampling scheme")
        for name in ("ess_threshold", "target_ess"):
            value = getattr(self, name)
            if value is not None and not 0 <= value <= 1:
                raise ValueError(f"{name} is a fraction of k in [0, 1], but {value} came")
        if self.uncertainty is not None:
            named(dict.fromkeys(UNCERTAINTY), self.uncertainty, "uncertainty")
        if not 0 <= self.kappa < math.inf:
            raise ValueError(
                "kappa must be 0 or more, and finite (below 0 it would reward uncertainty), but "
                f"{self.kappa} came"
            )

    def steps(self, num_steps: int) -> list[int]:
        """The scored steps of a chain of ``num_steps``, ascending.

        Raises:
            ValueError: a step or fraction outside the chain.
        """
        last = num_steps - 1
        if self.schedule is None:
            # the last step often adds no noise: copies made there stay copies
            return sorted({round(f * num_steps) for f in (0.2, 0.4, 0.6, 0.8)} - {last, num_steps})
        return scheduled_steps(self.schedule, num_steps, last)


class Population:
    """The weights, reward histories and lineage of P prompts x K particles under way.

    It knows nothing of latents: the caller scores, calls `select`, and permutes what its particles
    carry by the ancestors it gets back. `steer` and the pipeline hook share it. It lives on the
    CPU, in float64; n = P * K, prompt-major.
    """

    def __init__(
        self, fk: FeynmanKac, num_prompts: int, num_particles: int, num_steps: int, *,
        seed: int = 0, first_prompt: int = 0,
    ) -> None:  # fmt: skip
        self.fk, self.k, self.num_steps = fk, num_particles, num_steps
        self.steps = fk.steps(num_steps)
        self.state = smc.SMCState.init(num_prompts, num_particles)
        # stream 1: resampling draws must not be the particles' own noise
        self.generators = sample_generators(
            seed, num_prompts, 1, first_prompt=first_prompt, stream=1
        )
        n = num_prompts * num_particles
        self.history = torch.zeros(n, 0, dtype=torch.float64)
        self.base = torch.zeros(n, dtype=torch.float64)  # lambda S when last resampled
        self.log_ratio = torch.zeros(n, dtype=torch.float64)  # log p/tau since then
        self.lmbda = torch.zeros(num_prompts, dtype=torch.float64)
        self.lmbdas: list[Tensor] = []

    def select(
        self, i: int, rewards: Float[Tensor, " n"], std: Float[Tensor, " n"] | None = None
    ) -> Int[Tensor, "P K"] | None:
        """Reweight by the rewards of the clean predictions at step ``i``, maybe resample.

        With ``std`` they are first drawn to their mean, as far as they are uncertain.

        Returns:
            The ancestors ``(P, K)``, or None if no prompt was resampled.
        """
        rewards = rewards.double().cpu()
        if std is not None:
            rewards = shrink(*(v.double().cpu().view(-1, self.k) for v in (rewards, std))).view(-1)
        self.history = torch.cat([self.history, rewards[:, None]], 1)
        functional = named(POTENTIALS, self.fk.potential, "potential", or_function=True)(
            self.history
        )
        if functional.shape != rewards.shape:
            raise ValueError(
                f"the potential returned shape {tuple(functional.shape)} for histories "
                f"{tuple(self.history.shape)}; expected ({len(rewards)},)"
            )
        self.lmbda = self._temper((i + 1) / self.num_steps, functional)
        self.lmbdas.append(self.lmbda)
        log_potential = self._set_weights(self.lmbda, functional)
        mask = self._to_resample()
        ancestors = self.state.resample(mask, self.fk.resampling, self.generators)
        if not mask.any():
            return None
        self.history, log_potential = smc.gather_particles((self.history, log_potential), ancestors)
        resampled = mask.repeat_interleave(self.k)
        self.base = torch.where(resampled, log_potential, self.base)
        self.log_ratio = torch.where(resampled, 0.0, self.log_ratio)
        return ancestors

    def add_log_ratio(self, log_ratio: Float[Tensor, " n"]) -> None:
        """Account for a draw from a proposal: log p(x[i+1] | x[i]) - log tau(x[i+1] | x[i])."""
        self.log_ratio = self.log_ratio + log_ratio.double().cpu()

    def finish(self, rewards: Float[Tensor, " n"]) -> None:
        """The terminal reweighting, by the rewards of the returned samples."""
        lmbda = torch.full_like(self.lmbda, self.fk.lmbda)
        self._set_weights(lmbda, rewards.double().cpu())

    def result(
        self, particles: Samples, scores: Scores, best_of_n: BestOfN | None = None
    ) -> SteeringResult:
        """Collect a finished population, whose ``P * K`` final samples and scores these are."""
        state, (p, k) = self.state, self.state.log_weights.shape
        best, samples = pick_best(particles, scores, k)
        none = torch.zeros(0, p, k, dtype=torch.int64)
        return SteeringResult(
            samples=samples,
            particles=particles,
            scores=scores,
            best=best,
            log_weights=state.log_weights,
            log_z=state.log_evidence(),
            roots=state.num_roots(),
            ess=torch.stack([*state.ess_history, state.ess()]),
            ancestors=torch.stack(state.ancestors) if state.ancestors else none,
            lmbdas=torch.stack(self.lmbdas) if self.lmbdas else none[:, :, 0].double(),
            steps=self.steps,
            best_of_n=best_of_n,
        )

    def _set_weights(self, lmbda: Float[Tensor, " P"], s: Float[Tensor, " n"]):
        """Weights since the last resampling, from totals rather than by adding increments.

        A reward of -inf met on the way and not resampled away then costs nothing later: the next
        total replaces it, where increments would give -inf + inf.
        """
        log_potential = self._scaled(lmbda, s)
        self.state.log_weights = (log_potential - self.base + self.log_ratio).view(-1, self.k)
        return log_potential

    def _scaled(self, lmbda: Float[Tensor, " P"], s: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
        lmbda = lmbda.repeat_interleave(self.k)
        return torch.where(lmbda == 0, 0.0, lmbda * s)  # 0 * -inf is NaN

    def _temper(self, fraction: float, s: Float[Tensor, " n"]) -> Float[Tensor, " P"]:
        target = torch.full_like(self.lmbda, self.fk.lmbda)
        if self.fk.tempering != "adaptive":
            factor = named(TEMPERING, self.fk.tempering, "tempering", or_function=True)(fraction)
            if not math.isfinite(factor):
                raise ValueError(f"tempering({fraction}) is {factor}; expected a finite number")
            return target * factor

        def ess_at(lmbda):
            log_w = self._scaled(lmbda, s) - self.base + self.log_ratio
            return smc.ess(log_w.view(-1, self.k))

        enough = self.fk.target_ess * self.k
        low, high = self.lmbda, target
        for _ in range(50):
            middle = (low + high) / 2
            ok = ess_at(middle) >= enough
            low, high = torch.where(ok, middle, low), torch.where(ok, high, middle)
        return torch.where(ess_at(target) >= enough, target, low)

    def _to_resample(self) -> Bool[Tensor, " P"]:
        log_w = self.state.log_weights
        # equal weights select nothing, and where all are -inf there is nothing to select
        flat = (log_w == log_w[:, :1]).all(1)
        return self.state.should_resample(self.fk.ess_threshold) & ~flat


def shrink(rewards: Float[Tensor, "P K"], std: Float[Tensor, "P K"]) -> Float[Tensor, "P K"]:
    """r + (1 - w) (mean - r), w = V / (V + std^2), mean and unbiased variance V along K.

    Where std is 0 that is r, bit for bit. -inf stays, and counts for nothing.
    """
    alive = rewards.isfinite()
    n = alive.sum(1, keepdim=True)
    mean = rewards.where(alive, 0.0).sum(1, keepdim=True) / n.clamp(min=1)
    away = (rewards - mean).where(alive, 0.0)
    variance = away.square().sum(1, keepdim=True) / (n - 1).clamp(min=1)
    noise = std.square()
    lost = torch.where(noise > 0, noise / (variance + noise), 0.0)
    return rewards - lost * away


def _cautious(reward: Reward, kappa: float, uncertainty: str) -> Reward:
    """The reward minus kappa times its std, which it must have."""

    def lower_bound(samples: Samples) -> Scores:
        scores = evaluate(reward, samples)
        if scores.std is None:
            raise ValueError(
                f"uncertainty={uncertainty!r} needs a reward that knows its standard deviation, "
                f"and {reward.info.name!r} gave none; use ensemble or uncertain, or set "
                "uncertainty to None"
            )
        if kappa == 0:
            return scores
        value = scores.value - kappa * scores.std
        return Scores(value, scores.std, {"reward": scores.value, **scores.parts})

    return as_reward(lower_bound, replace(reward.info, range=(-math.inf, reward.info.range[1])))


def steer(
    policy: Policy,
    reward: Reward | Callable | str | dict,
    prompts: str | Sequence[str],
    *,
    num_particles: int = 4,
    potential: str | Potential = "difference",
    lmbda: float = 10.0,
    resampling: str = "systematic",
    ess_threshold: float | None = 0.5,
    schedule: int | Sequence[int] | Sequence[float] | None = None,
    tempering: str | Callable[[float], float] = "constant",
    target_ess: float = 0.5,
    uncertainty: str | None = None,
    kappa: float = 1.0,
    proposal: str = "policy",
    gradient_clip: float | None = None,
    num_x0_samples: int = 1,
    best_of_n: bool = False,
    seed: int = 0,
    inputs: dict[str, Any] | None = None,
    max_batch: int | None = None,
    decode_batch: int | None = None,
    progress: bool = True,
) -> SteeringResult:
    """Steer a policy's samples towards a reward at inference time.

    With ``num_particles=1`` or ``lmbda=0`` (and no gradient) it is plain sampling, bit for bit,
    with the generators ``sample_generators(seed, P, K)``.

    Args:
        policy: anything that fulfils `Policy`.
        reward: what `make_reward` takes: a registered name or spec, a reward, a callable. Where it
            is -inf for a clean prediction on the way, that lineage ends at the next resampling,
            even if its samples could still have become admissible.
        prompts: one or more; for an unconditional model, empty strings.
        num_particles: K, particles per prompt.
        potential, lmbda, resampling, ess_threshold, schedule, tempering, target_ess, uncertainty,
            kappa: see `FeynmanKac`. With ``uncertainty`` the reward must know its standard
            deviation, else the first step raises. With "terminal", ``result.scores.value`` is what
            was steered by, r - kappa s, and so is that of ``best_of_n``; r is
            ``scores.parts["reward"]``.
        proposal: "policy" draws from the model's law; "gradient" moves its mean, at scheduled
            steps, by std^2 * lambda * d reward(law.x0) / d x[i], and corrects the weights by the
            exact p/tau. Needs a differentiable reward and a law with ``shift``. Of tokens it moves
            log-probabilities by lambda * d reward / d x[i], x[i] being one-hot vectors; that needs
            a policy with ``relax``, and a reward that takes relaxed tokens. "gradient_x0", of
            tokens only, takes the network as constant: no pass back through it, and no first-order
            expansion of what it says when a letter appears. The weights are exact in any case.
            With one particle this is classifier guidance: one weight corrects nothing.
        gradient_clip: largest norm of lambda * d reward / d x[i] per particle.
        num_x0_samples: N > 1 scores N draws of ``law.sample_x0`` instead of ``law.x0`` and takes
            (1 / lambda) log mean exp(lambda r), the unbiased estimate of the optimal twist.
        best_of_n: also draw K plain samples per prompt from the same noise, for comparison.
        seed: every particle's noise depends on (seed, prompt index, particle index) alone.
        inputs: further inputs of ``policy.encode``.
        max_batch: most particles in one network call; prompts are then taken in groups (at least
            one prompt, whole, at a time).
        decode_batch: most samples decoded at once.
        progress: show a progress bar on work longer than two seconds.

    Raises:
        ValueError: bad arguments, before anything is computed; a reward that is NaN, or of the
            wrong shape or dtype, naming the sample.
    """
    fk = FeynmanKac(
        lmbda, potential, tempering, resampling, ess_threshold, schedule, target_ess,
        uncertainty, kappa,
    )  # fmt: skip
    prompts = [prompts] if isinstance(prompts, str) else list(prompts)
    reward = make_reward(reward)
    check_options(
        reward, num_particles=num_particles, proposal=proposal, gradient_clip=gradient_clip,
        num_x0_samples=num_x0_samples, uncertainty=uncertainty, max_batch=max_batch,
        decode_batch=decode_batch,
    )  # fmt: skip
    check_policy(policy, prompts, num_particles)
    fk.steps(policy.num_steps)  # a bad schedule is refused before any compute
    if uncertainty is not None and not isinstance(reward, SetReward):  # which is refused below
        reward = _cautious(reward, kappa if uncertainty == "terminal" else 0.0, uncertainty)

    def run(walk: Walk) -> SteeringResult:
        result = _steered(walk, fk, proposal, gradient_clip, num_x0_samples)
        result.best_of_n = walk.best_of_n() if best_of_n else None
        return result

    result = run_in_groups(
        run, policy, reward, prompts, num_particles, name="steer", chains=2 if best_of_n else 1,
        seed=seed, inputs=inputs, max_batch=max_batch, decode_batch=decode_batch,
        progress=progress,
    )  # fmt: skip
    warn_if_collapsed(result, prompts)
    return result


def _steered(
    walk: Walk, fk: FeynmanKac, proposal: str, gradient_clip: float | None, num_x0_samples: int
) -> SteeringResult:
    """Algorithm 1 on one group of prompts."""
    policy, condition, generators = walk.policy, walk.condition, walk.generators()
    many = walk.generators(stream=2)  # must not disturb the particles' own noise
    population = Population(
        fk, walk.num_prompts, walk.k, policy.num_steps,
        seed=walk.seed, first_prompt=walk.first_prompt,
    )  # fmt: skip
    x = policy.initial(condition, generators)
    if proposal == "gradient" and not (x.is_floating_point() or hasattr(policy, "relax")):
        raise ValueError(
            f"proposal='gradient' needs continuous latents, and this policy's are {x.dtype}; "
            "use proposal='policy'"
        )
    for i in range(policy.num_steps):
        gradient = None
        scored = i in population.steps
        if scored and proposal != "policy":
            law, rewards, std, gradient = _differentiate(
                walk, x, i, fk, num_x0_samples, many, proposal
            )
        else:
            law = policy.step_law(x, i, condition)
            if i == 0:
                check_law(law, _needs(proposal, num_x0_samples))
            if scored:
                rewards, std = _score(walk, law, fk, num_x0_samples, many)
        if scored:
            ancestors = population.select(i, rewards, std)
            if ancestors is not None:
                # a particle's condition is its prompt's: it stays in its row
                law, gradient = smc.gather_particles((law, gradient), ancestors)
        elif i == 0:
            walk.try_reward(law)
        if gradient is None:
            x = law.sample(generators)
        else:
            lmbda = population.lmbda.repeat_interleave(walk.k)
            guide = _scale(gradient, lmbda, gradient_clip)
            guided = law.shift(guide)
            x = guided.sample(generators)
            population.add_log_ratio(law.log_prob(x) - guided.log_prob(x))
        walk.bar.update()
    particles = walk.decode(x)
    scores = evaluate(walk.reward, particles)
    population.finish(scores.value)
    return population.result(particles, scores)


def _score(walk, law, fk, num, generators):
    """Rewards of the clean predictions, and their std where it shrinks them."""
    if fk.uncertainty != "intermediate":
        return walk.score_law(law, fk.lmbda, num, generators), None
    scores = evaluate(walk.reward, walk.decode(law.x0))
    return scores.value, scores.std


def _differentiate(walk, x, i, fk, num, generators, proposal):
    """The law at x[i], the rewards with their std (see `_score`), and d reward / d x[i]."""
    through = proposal == "gradient"  # the network, too
    if through and not x.is_floating_point():
        x = walk.policy.relax(x)  # the law of one-hot vectors is theirs, and has a gradient
    at = x.detach().requires_grad_(through)
    with torch.set_grad_enabled(through):
        law = walk.policy.step_law(at, i, walk.condition)
    check_law(law, _needs(proposal, num))
    with torch.enable_grad():
        if not through:
            at = law.x0 = law.x0.detach().requires_grad_()
        rewards, std = _score(walk, law, fk, num, generators)
        require_gradient(walk.reward, rewards, **_ask_gradient(proposal))
        (gradient,) = torch.autograd.grad(rewards.sum(), at)
    rewards, std = rewards.detach(), None if std is None else std.detach()
    dead = (rewards == -math.inf).to(at.device).view(-1, *[1] * (at.ndim - 1))
    gradient = gradient.masked_fill(dead, 0.0)  # no direction is better; often it is NaN
    bad = ~gradient.isfinite().flatten(1).all(1)
    if bad.any():
        j = int(bad.nonzero()[0])
        raise ValueError(
            f"proposal={proposal!r}: reward {walk.reward.info.name!r} gave sample {j} "
            f"({walk.condition.prompts[j]!r}) a finite value, but no finite gradient"
        )
    if not through:
        law.x0, gradient = at.detach(), law.x0_gradient(gradient)
    return law, rewards, std, gradient


def _scale(
    gradient: Float[Tensor, "n ..."], lmbda: Float[Tensor, " n"], clip: float | None
) -> Float[Tensor, "n ..."]:
    """lambda * gradient, no longer than ``clip``."""
    gradient = gradient * lmbda.to(gradient).view(-1, *[1] * (gradient.ndim - 1))
    if clip is None:
        return gradient
    norm = gradient.flatten(1).norm(dim=1).view(-1, *[1] * (gradient.ndim - 1))
    return gradient * (clip / norm.clamp(min=clip))


def _ask_gradient(proposal: str) -> dict[str, str]:
    return dict(what=f"proposal={proposal!r}", instead="use proposal='policy'")


PROPOSALS: dict[str, tuple[str, ...]] = {
    "policy": (),
    "gradient": ("shift",),
    "gradient_x0": ("shift", "x0_gradient"),
}
"""Name -> what a law needs for it."""


def _needs(proposal: str, num_x0_samples: int) -> dict[str, str]:
    """Member of a law -> the option that needs it."""
    needs = {name: f"proposal={proposal!r}" for name in PROPOSALS[proposal]}
    return needs | ({"sample_x0": "num_x0_samples > 1"} if num_x0_samples > 1 else {})


def check_options(
    reward: Reward,
    *,
    num_particles: int,
    proposal: str = "policy",
    gradient_clip: float | None = None,
    num_x0_samples: int = 1,
    uncertainty: str | None = None,
    max_batch: int | None = None,
    decode_batch: int | None = None,
) -> None:
    """Refuse what `steer` would refuse of these options, without a policy.

    Raises:
        ValueError: a number out of range, an unknown proposal, a gradient proposal for a reward
            that declares it has no gradient, or "intermediate" uncertainty of several draws.
    """
    check_counts(
        num_particles=num_particles, num_x0_samples=num_x0_samples,
        max_batch=max_batch, decode_batch=decode_batch,
    )  # fmt: skip
    named(PROPOSALS, proposal, "proposal")
    if proposal != "policy":
        require_gradient(reward, **_ask_gradient(proposal))
    if gradient_clip is not None and not 0 < gradient_clip < math.inf:
        raise ValueError(
            f"gradient_clip must be positive and finite (None: no clipping), but {gradient_clip} "
            "came"
        )
    if uncertainty == "intermediate" and num_x0_samples > 1:
        raise ValueError(
            "uncertainty='intermediate' is that of one clean prediction, but num_x0_samples="
            f"{num_x0_samples} came; use 1, or uncertainty='terminal'"
        )
