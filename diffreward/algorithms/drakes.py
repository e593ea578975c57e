"""DRAKES: the gradient of the reward through the relaxed end of a discrete chain, with a KL.

Wang et al. 2024, *Fine-Tuning Discrete Diffusion Models via Reward Optimization with Applications
to DNA and Protein Design*, arXiv:2410.13643. It maximises

    E[ r(x[T]) ] - alpha sum_i E[ KL( p(. | x[i]) || p_ref(. | x[i]) ) ]

by backpropagation through the last K steps, which are drawn with `StepLaw.rsample` (Gumbel-softmax
for tokens); the steps before are drawn hard and have no gradient. What the reward reads are the
likeliest letters of x[T], with the gradient of the relaxed ones (straight-through).

paper               code
alpha               ``kl``, reward per nat
K                   ``steps``
tau, relaxation     of the policy (`diffreward.policies.masked`)
t = T .. 0          i = 0 .. T-1: this package counts from noise to data

The KL of a step is that of the laws themselves (`StepLaw.kl`): of the positions that may still
change. The early steps have one, too. Its gradient there is only that by the parameters, as their
states have none; and as each costs both networks, ``early`` of them are drawn for each sample and
weighted, which leaves the sum unbiased.

On a Gaussian policy, whose ``rsample`` is exact, this is DRaFT-K (arXiv:2309.17400) with a KL.

Differences from the authors' code, which ``official_kl=True`` brings back as far as it is a
formula: their KL is gated by the *visible* positions, where both laws are the same, so that every
hard step adds exactly 0, computed with both networks; only half-unmasked positions contribute. It
has the weight 1 / t instead of the step's rate, (t - s) / t. Their relaxation is the policy's
``relaxation="official"``. Presets have the published values: 128 steps with tau 1 for DNA, 49 with
tau 0.5 for proteins; AdamW with learning rates 1e-4 and 3e-5, batches of 32 x 4 and 16 x 8, clipped
to norm 1, are options of the engine.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.utils.checkpoint import checkpoint as checkpointed

from diffreward.algorithms.base import PathwiseAlgorithm, require_kappa
from diffreward.policy import Condition, Generators, Policy, StepLaw, randn
from diffreward.rewards import Scores
from diffreward.samples import Samples


@dataclass(frozen=True)
class DRAKES(PathwiseAlgorithm):
    """Direct reward backpropagation with a KL

    Args:
        steps: K, how many are differentiated; null: all.
        kl: alpha, reward per nat; 0: none, and the pretrained model is not called.
        warmup: share of the run over which alpha rises from 0.
        early: how many of the steps before the last K have a KL, drawn anew for each sample; null:
            all.
        straight_through: the reward reads the likeliest letters, not the relaxed ones.
        official_kl: the authors' gate, for comparisons; for masked policies.
        checkpoint: keep a step's input instead of its activations, and compute it twice.
        kappa: what is climbed is the reward minus kappa times its std, with the gradient of both;
            above 0, rewards without a std are refused.

    Raises:
        ValueError: a value out of range; in `loss`, more steps than the chain has.
    """

    steps: int | None = 8
    kl: float = 0.01
    warmup: float = 0.0
    early: int | None = 2
    straight_through: bool = True
    official_kl: bool = False
    checkpoint: bool = False
    kappa: float = 0.0

    presets: ClassVar[dict[str, dict[str, Any]]] = {
        "paper_dna": {"steps": 50, "kl": 1e-3},
        "paper_protein": {"steps": 24, "kl": 3e-4},
    }

    def __post_init__(self) -> None:
        require_kappa(self)
        if self.steps is not None and self.steps < 1:
            raise ValueError(f"steps must be 1 or more, or null (all), but {self.steps} came")
        if not 0 <= self.kl < math.inf:
            raise ValueError(f"kl must be 0 or more, and finite, but {self.kl} came")
        if not 0 <= self.warmup <= 1:
            raise ValueError(f"warmup is a share of the run, in [0, 1], but {self.warmup} came")
        if self.early is not None and self.early < 0:
            raise ValueError(f"early must be 0 or more, or null (all), but {self.early} came")

    @property
    def needs_reference(self) -> bool:
        return self.kl > 0

    def at(self, progress: float) -> DRAKES:
        if not self.warmup:
            return self
        return replace(self, kl=self.kl * min(1.0, progress / self.warmup), warmup=0.0)

    def loss(
        self,
        policy: Policy,
        condition: Condition,
        generator: Generators,
        score: Callable[[Samples], Scores],
        reference: Policy | None = None,
    ) -> tuple[Float[Tensor, " b"], Samples, Scores]:
        """See the module's text; ``scores.parts["kl"]`` is the sum of the steps' KL, in nats."""
        first = policy.num_steps - (policy.num_steps if self.steps is None else self.steps)
        if first < 0:
            raise ValueError(
                f"steps={self.steps} are to be differentiated, but the chain has {policy.num_steps}"
            )
        x = policy.initial(condition, generator)
        regularised, weight = self._with_kl(first, len(x), generator)
        divergence = _official_kl if self.official_kl else _kl
        found = [torch.zeros(len(x), device=x.device)]
        for i in range(policy.num_steps):
            soft = i >= first
            rows = regularised[:, i].nonzero()[:, 0] if i < first else torch.arange(len(x))
            at_once = soft or (len(rows) == len(x))  # the law that is drawn from is the KL's, too
            with nullcontext() if at_once else torch.no_grad():
                law = _law(policy, x, i, condition, self.checkpoint)
            if self.kl > 0 and len(rows):
                some, its, c = x, law, condition
                if not at_once:
                    some, c = x[rows.to(x.device)], condition.take(rows)
                    its = _law(policy, some, i, c, self.checkpoint)
                with nullcontext() if soft else torch.no_grad():
                    other = _law(reference, some, i, c, self.checkpoint)
                nats = divergence(its, other, i, policy.num_steps) * (1.0 if soft else weight)
                every = torch.zeros(len(x), dtype=nats.dtype, device=x.device)
                found.append(every.index_add(0, rows.to(x.device), nats))
            x = law.rsample(generator) if soft else law.sample(generator)
        if self.straight_through and hasattr(policy, "relax"):
            x = _hard(x)
        value, samples, scores = self.judge(policy, x, condition, score)
        if self.kl == 0:
            return -value, samples, scores
        nats = torch.stack([each.to(found[-1]) for each in found]).sum(0)
        parts = {**scores.parts, "kl": nats.detach()}
        return self.kl * nats - value, samples, replace(scores, parts=parts)

    def _with_kl(
        self, first: int, num_samples: int, generator: Generators
    ) -> tuple[Bool[Tensor, "b s"], float]:
        """Which early steps of each sample have a KL, and what it counts."""
        if self.kl == 0 or self.early == 0 or first == 0:
            return torch.zeros(num_samples, max(first, 1), dtype=torch.bool), 0.0
        if self.early is None or self.early >= first:
            return torch.ones(num_samples, first, dtype=torch.bool), 1.0
        order = randn((num_samples, first), generator, dtype=torch.float64).argsort(1)
        return order.argsort(1) < self.early, first / self.early


def _law(policy: Policy, x: Tensor, i: int, condition: Condition, checkpoint: bool) -> StepLaw:
    if checkpoint and torch.is_grad_enabled():
        # the draw stays outside: it must not be repeated with the generators' later states
        return checkpointed(policy.step_law, x, i, condition, use_reentrant=False)
    return policy.step_law(x, i, condition)


def _hard(x: Float[Tensor, "b l v1"]) -> Float[Tensor, "b l v1"]:
    """The likeliest letter of each position, one-hot, with the gradient of x."""
    letters = torch.nn.functional.one_hot(x[..., :-1].argmax(-1), x.shape[-1]).to(x)
    return letters + (x - x.detach())


def _kl(law: StepLaw, other: StepLaw, i: int, num_steps: int) -> Float[Tensor, " b"]:
    return law.kl(other)


def _official_kl(law, other, i: int, num_steps: int) -> Float[Tensor, " b"]:
    """The authors' term: (1 / t) sum_l (1 - m_l) sum_k a_lk (p log(p / p') - p + p').

    a and m are the masses of letters and of MASK in x[i]. Both p are one-hot wherever MASK is not
    the largest of them, and cancel.
    """
    t = 1 - i / num_steps
    letters, m = law.state[..., :-1], law.state[..., -1]
    log_p, log_q = (each.hidden[..., :-1].log_softmax(-1) for each in (law, other))
    possible = (log_p > -math.inf) & (log_q > -math.inf)  # of both or none
    log_p, log_q = (torch.where(possible, each, 0.0) for each in (log_p, log_q))
    p, q = log_p.exp(), log_q.exp()
    terms = p * (log_p - log_q) - p + q
    undecided = law.state.argmax(-1) == law.state.shape[-1] - 1
    return (undecided * (1 - m) * (letters * terms).sum(-1)).sum(1) / t
