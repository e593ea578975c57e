"""DRAGON: finetuning with rewards of single samples and of whole sets.

Bai et al. 2025, *DRAGON: Distributional Rewards Optimize Diffusion Generative Models*,
arXiv:2504.15217. Of the model's own samples two sets are drawn, D1 and D2, and rearranged into a
better one D+ and a worse one D-; the model is then drawn to D+ and pushed from D- with a loss on
preferences, Diffusion-DPO or Diffusion-KTO (`diffreward.algorithms.dpo`). As only sets are
compared, the reward may be one that a single sample does not have: diversity, or the distance of a
distribution to another.

D1 is the first and D2 the last half of each prompt's samples; sample j of D1 and sample j of D2 are
a pair. How a pair is divided (``builder``):

winners     the one with the higher reward goes to D+; equal rewards: neither
swap        a set reward r; greedily: P, N = D1, D2 (the better of them first). For each pair:
            exchange the two if that raises r(P). Then D+ = P, D- = N
influence   a set reward; the one that the value of all samples owes more to goes to D+
top         no pairs: the best of a prompt's samples go to D+, as many of the worst to D-
auto        swap for a reward of sets, else winners

``swap`` takes 1 evaluation of r per pair and sweep, and 2 for the sets as they came. r(P) never
falls, so r(D+) >= max(r(D1), r(D2)); D+ and D- together are D1 and D2, each pair divided between
them; and where r is a mean over samples one sweep finds the winners. Sweeps end with one that
exchanges nothing: P is then a local optimum over single exchanges. Pairs of which either makes no
difference to r(P), when last looked at, are dropped.

Not the paper's, whose pseudo-code and hyper-parameters were not available: the halves, all
builders but ``winners``, the order of a sweep, ``bound``, and the values of all options. Which of
D1 and D2 a sweep starts from is ``start``; "first" is D1 whatever its value, which guarantees
r(D+) >= r(D1) only.

Rewards with a standard deviation and ``bound`` = k > 0: a sample counts with value - k std against
D-, and with value + k std against D+: pairs that may be the other way round are dropped. These
are the pairs a, b whose difference is not above k (std_a + std_b); or, with ``independent``, which
takes the errors of two samples for independent, k sqrt(std_a^2 + std_b^2), which drops fewer.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from diffreward.algorithms.base import (
    DenoisingAlgorithm,
    History,
    require_choice,
    require_positive,
)
from diffreward.algorithms.dpo import (
    KTO,
    diffusion_dpo,
    implicit_reward,
    preference_diagnostics,
    warn_nothing_to_learn,
)
from diffreward.rewards import Reward, Scores, SetScores

LOSSES = ("dpo", "kto")
BUILDERS = ("auto", "winners", "swap", "influence", "top")
STARTS = ("better", "first")
ORDERS = ("fixed", "random")

Rows = Int[Tensor, " n"]


@dataclass(frozen=True)
class DRAGON(DenoisingAlgorithm):
    """DRAGON

    Args:
        objective: "dpo" or "kto".
        beta: reward per unit of the denoising loss; see `diffreward.algorithms.dpo`.
        builder: how D+ and D- are made; see the module's text.
        paired: compare samples of one prompt; false: of any prompts, drawn at random, which needs
            "kto".
        share: of ``top``: D+ and D- have each this share of the samples, 0.5 at most.
        bound: k; 0: standard deviations are ignored.
        independent: the errors of two samples are independent; false: they may be as opposed as can
            be.
        sweeps: of ``swap``: how often all pairs are gone through, at most.
        start: of ``swap``: "better" or "first" of the two sets.
        order: of ``swap``: "fixed", as the prompts come, or "random", anew for each sweep.
        seed: of what is random here.
        desirable: of "kto": weight of D+.
        undesirable: of "kto": weight of D-; above ``desirable`` is loss aversion.
        shared_draws: samples of one prompt get the same (time, noise).
        num_draws: draws of (time, noise) per sample and update.
        passes: how often a rollout is gone through.
        minibatches: updates per pass; sets are made of the whole rollout.

    Raises:
        ValueError: a value out of range, or options that contradict each other; in `credit`, an odd
            number of samples of a prompt, too few for the reward, a builder that does not fit it.
    """

    objective: str = "dpo"
    beta: float = 2500.0
    builder: str = "auto"
    paired: bool = True
    share: float = 0.5
    bound: float = 0.0
    independent: bool = False
    sweeps: int = 1
    start: str = "better"
    order: str = "fixed"
    seed: int = 0
    desirable: float = 1.0
    undesirable: float = 1.0
    shared_draws: bool = True
    num_draws: int = 1
    passes: int = 1
    minibatches: int = 1

    needs_reference = True
    presets: ClassVar[dict[str, dict[str, Any]]] = {
        "masked": {"beta": 0.1},
        "kto": {"objective": "kto"},
        "kto_unpaired": {"objective": "kto", "paired": False},
    }

    def __post_init__(self) -> None:
        require_choice(self, "objective", LOSSES)
        require_choice(self, "builder", BUILDERS)
        require_choice(self, "start", STARTS)
        require_choice(self, "order", ORDERS)
        require_positive(
            self, "beta", "sweeps", "desirable", "undesirable", "num_draws", "passes",
            "minibatches",
        )  # fmt: skip
        if not 0 < self.share <= 0.5:
            raise ValueError(f"share must be above 0 and at most 0.5, but {self.share} came")
        if self.seed < 0:
            raise ValueError(f"seed must be 0 or more, but {self.seed} came")
        if not 0 <= self.bound < math.inf:
            raise ValueError(f"bound must be 0 or more, and finite, but {self.bound} came")
        if self.objective == "dpo" and not self.paired:
            raise ValueError(
                "DPO compares two samples of one prompt, so it needs paired=true; samples of "
                "different prompts take objective='kto'"
            )

    def at(self, progress: float) -> DRAGON:
        """With a seed of its own for each iteration."""
        state = np.random.SeedSequence([self.seed, round(progress * 2**32)])
        return replace(self, seed=int(state.generate_state(1)[0]))

    def check(self, reward: Reward) -> None:
        """Refuse a builder that does not fit the reward."""
        self._builder(reward.info.of_sets)

    def credit(
        self, scores: Scores, groups: Int[Tensor, " b"], prompts: Sequence[str], history: History
    ) -> Scores:
        """Labels: 1 in D+, -1 in D-, 0 dropped.

        ``parts["pair"]`` numbers the pairs, -1 where there is none; with ``swap``,
        ``parts["set_value"]`` is r(D+) for every sample, and ``parts["set_gain"]`` what it is above
        the better of D1 and D2.
        """
        builder, parts = self._builder(isinstance(scores, SetScores)), {}
        value = scores.value.double()
        std = torch.zeros_like(value) if scores.std is None else scores.std.double()
        slack = self.bound * std

        def above(a: Rows, b: Rows, rounding: float = 0.0) -> Tensor:
            together = slack[a].hypot(slack[b]) if self.independent else slack[a] + slack[b]
            return value[a] - value[b] > together + rounding

        generator = torch.Generator().manual_seed(self.seed)
        if builder == "top":
            where = groups if self.paired else torch.zeros_like(groups)
            winner, loser = _extremes(value - slack, value + slack, where, self.share)
            certain = above(winner, loser)
            winner, loser = winner[certain], loser[certain]
        else:
            first, second = halves(groups)
            if not self.paired:
                second = second[torch.randperm(len(second), generator=generator)]
            if builder == "swap":
                winner, loser, numbers = self._swap(scores, first, second, generator)
                parts = {name: torch.full_like(value, v) for name, v in numbers.items()}
            else:
                # differences of a set's values are rounded, also where two samples are the same
                rounding = 1e-9 * float(value.abs().max()) if builder == "influence" else 0.0
                for_first = above(first, second, rounding)
                for_second = above(second, first, rounding)
                winner = torch.cat([first[for_first], second[for_second]])
                loser = torch.cat([second[for_first], first[for_second]])
        if not len(winner):
            warn_nothing_to_learn(
                "no sample is better than the one it is compared with"
                + (f" by bound={self.bound} standard deviations" if self.bound else "")
            )
        label, pair = torch.zeros_like(value), torch.full_like(value, -1.0)
        label[winner], label[loser] = 1.0, -1.0
        number = torch.arange(len(winner)).to(pair)
        pair[winner], pair[loser] = number, number
        return Scores(label, None, {"pair": pair, **parts})

    def loss(
        self,
        error: Float[Tensor, "b S"],
        error_ref: Float[Tensor, "b S"] | None,
        scores: Scores,
        groups: Int[Tensor, " b"],
    ) -> Float[Tensor, ""]:
        """The mean over pairs ("dpo"), or over samples with a label ("kto"); 0 without any."""
        if self.objective == "dpo":
            winner, loser = _pairs(scores)
            each = diffusion_dpo(error, error_ref, winner, loser, self.beta)
            return each.sum() / max(1, len(winner))
        kto = KTO(self.beta, desirable=self.desirable, undesirable=self.undesirable)
        return kto.loss(error, error_ref, scores, groups)

    def diagnostics(
        self,
        error: Float[Tensor, "b S"],
        error_ref: Float[Tensor, "b S"] | None,
        scores: Scores,
        groups: Int[Tensor, " b"],
    ) -> dict[str, float]:
        """See `preference_diagnostics`.

        ``labelled``: share of samples in D+ or D-; and, with ``swap``, ``set_value`` and
        ``set_gain`` of the whole rollout, as `credit` says.
        """
        h, label = implicit_reward(error, error_ref, self.beta), scores.value
        positive, negative = ((y * label > 0).nonzero().squeeze(1) for y in (1, -1))
        if self.paired:
            positive, negative = _pairs(scores)
        numbers = {"labelled": (label != 0).double().mean().item()}
        numbers |= preference_diagnostics(h, positive, negative, self.paired)
        sets = [name for name in ("set_value", "set_gain") if name in scores.parts]
        return numbers | {name: scores.parts[name][0].item() for name in sets}

    def _builder(self, of_sets: bool) -> str:
        builder = self.builder
        if builder == "auto":
            builder = "swap" if of_sets else "winners"
        if builder in ("swap", "influence") and not of_sets:
            raise ValueError(
                f"builder={builder!r} needs a reward of sets, but this one scores single samples; "
                "use winners or top"
            )
        if builder == "winners" and of_sets:
            raise ValueError(
                "builder='winners' compares single samples, but this is a reward of sets; use "
                "swap, or influence"
            )
        if self.bound and of_sets:
            raise ValueError(
                f"bound={self.bound} needs standard deviations of samples, and a reward of sets "
                "gives none; set bound to 0"
            )
        return builder

    def _swap(
        self, scores: SetScores, first: Rows, second: Rows, generator: torch.Generator
    ) -> tuple[Tensor, Tensor, dict[str, float]]:
        """Rows of winners and losers, and the value of D+."""
        reward, n = scores.reward, len(first)
        if n < reward.min_samples:
            raise ValueError(
                f"reward {reward.info.name!r} needs sets of {reward.min_samples} samples or more, "
                f"and D1 and D2 have {n} each; draw more samples or prompts per update, or use "
                "builder='influence'"
            )
        shuffle = generator if self.order == "random" else None
        found = swap_sets(
            lambda rows: float(reward.value(scores.features[rows])), first, second,
            sweeps=self.sweeps, start=self.start, generator=shuffle,
        )  # fmt: skip
        decided = ~found.tied
        numbers = {"set_value": found.value, "set_gain": found.value - max(found.before)}
        return found.plus[decided], found.minus[decided], numbers


@dataclass(frozen=True)
class Swapped:
    """What `swap_sets` found.

    Attributes:
        plus: rows of D+.
        minus: rows of D-; ``minus[j]`` is the partner of ``plus[j]``.
        tied: pairs whose exchange made no difference to the value of D+.
        value: of D+.
        before: of the two sets as they came.
    """

    plus: Rows
    minus: Rows
    tied: Tensor
    value: float
    before: tuple[float, float]


@torch.no_grad()  # of the features; nothing here is differentiated
def swap_sets(
    value: Callable[[Rows], float],
    first: Rows,
    second: Rows,
    *,
    sweeps: int = 1,
    start: str = "better",
    generator: torch.Generator | None = None,
) -> Swapped:
    """D+ and D- by greedy exchanges within pairs; see the module's text.

    Args:
        value: of the set with these rows; higher is better.
        first: rows of D1.
        second: rows of D2; ``second[j]`` is the partner of ``first[j]``.
        sweeps: most sweeps; one that exchanges nothing is the last.
        start: "better" or "first" of the sets.
        generator: for an order that is drawn for each sweep; None: as they come.

    Raises:
        ValueError: a set's value is NaN.
    """
    plus, minus, before = first.clone(), second.clone(), (value(first), value(second))
    if math.isnan(sum(before)):
        raise ValueError(f"the values of the two sets are {before[0]} and {before[1]}")
    best = before[0]
    if start == "better" and before[1] > best:
        plus, minus, best = minus, plus, before[1]
    n = len(plus)
    tied = torch.zeros(n, dtype=torch.bool)
    for _ in range(sweeps):
        order = torch.arange(n) if generator is None else torch.randperm(n, generator=generator)
        exchanged = False
        for j in order.tolist():
            trial = plus.clone()
            trial[j] = minus[j]
            found = value(trial)
            if math.isnan(found):
                raise ValueError(f"the value of a set is NaN after an exchange of its sample {j}")
            tied[j] = found == best
            if found > best:
                minus[j], plus, best, exchanged = plus[j].clone(), trial, found, True
        if not exchanged:
            break
    return Swapped(plus, minus, tied, best, before)


def halves(groups: Int[Tensor, " b"]) -> tuple[Rows, Rows]:
    """Rows of the first and of the last half of each group, in the same order of groups.

    Raises:
        ValueError: a group of an odd number.
    """
    _, at, count = groups.unique(return_inverse=True, return_counts=True)
    if (count % 2).any():
        odd = int(count[(count % 2).nonzero()[0, 0]])
        raise ValueError(
            f"a prompt's samples are divided into two sets of pairs, but a prompt has {odd}; make "
            "samples_per_prompt even, or use builder='top'"
        )
    order = at.argsort(stable=True)
    place = torch.arange(len(at)) - (count.cumsum(0) - count)[at[order]]
    early = place < count[at[order]] // 2
    return order[early], order[~early]


def _extremes(
    low: Tensor, high: Tensor, groups: Int[Tensor, " b"], share: float
) -> tuple[Rows, Rows]:
    """Rows of the best by ``low`` and of the worst by ``high``, the k-th with the k-th."""
    best, worst = [], []
    for group in groups.unique():
        rows = (groups == group).nonzero().squeeze(1)
        k = max(1, math.floor(share * len(rows)))
        best.append(rows[low[rows].argsort(descending=True, stable=True)[:k]])
        worst.append(rows[high[rows].argsort(stable=True)[:k]])
    return torch.cat(best), torch.cat(worst)


def _pairs(scores: Scores) -> tuple[Rows, Rows]:
    """Rows of winners and losers, pair by pair."""
    if "pair" not in scores.parts:
        raise ValueError(
            "DRAGON's loss needs the labels and pairs that DRAGON.credit gives, but these scores "
            "have no pairs"
        )
    pair = scores.parts["pair"]
    winner, loser = ((y * scores.value > 0).nonzero().squeeze(1) for y in (1, -1))
    winner, loser = winner[pair[winner].argsort()], loser[pair[loser].argsort()]
    if not torch.equal(pair[winner], pair[loser]):
        raise ValueError("the samples of a pair came in different updates; keep groups whole")
    return winner, loser
