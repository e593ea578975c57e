"""Sequential Monte Carlo bookkeeping: log-weights, effective sample size, resampling.

Nothing here knows about diffusion or rewards. There are `p` independent populations (in steering:
prompts) of `k` particles each. Every array is `[p, k]`, and rows never mix. For one row:

    w_j   unnormalised weight; only its logarithm is stored
    W_j   w_j / sum(w), the normalised weight                         `log_normalise`
    ESS   1 / sum_j W_j^2, between 1 and k                            `ess`
    a_n   ancestor: the index of the particle that slot n copies      `resample`
    N_j   number of n with a_n = j, the offspring of j; every scheme has E[N_j | W] = k W_j
    Z     normalising constant, E of the product of all increments    `SMCState.log_evidence`

Weights live between resamplings. A skipped resampling keeps them: a row is reset to equal weights
only when it is resampled, and its mean weight then moves into the running estimate of log Z. That
estimate is unbiased for Z (not for log Z), for every scheme and for ESS-triggered resampling.

    scheme        N_j                                       uniforms per row
    multinomial   binomial(k, W_j)                          k
    residual      floor(k W_j) + multinomial remainder      k (those beyond the remainder unused)
    stratified    less than 2 away from k W_j               k, one per stratum of length 1/k
    systematic    floor(k W_j) or ceil(k W_j)               1, shared by all strata
    ssp           floor(k W_j) or ceil(k W_j)               k - 1

Systematic resampling is the usual choice. SSP costs a loop over k, and unlike systematic
resampling it is proved consistent whatever the order of the particles.

Randomness: `generator` is a `torch.Generator`, None (torch's global one), or a list with one
generator per row. With a list, row r draws from `generator[r]` alone, and only when it is itself
resampled, so that its result does not depend on the other rows. Uniforms are drawn in float64 on
the generator's device and then moved.

Everything runs in float64. A state is a few hundred numbers, so it may stay on the CPU, which is
needed on devices without float64: increments are moved to it, and `gather_particles` moves
indices to the tensors they permute.

References: Douc, Cappé and Moulines, Comparison of resampling schemes for particle filtering
(2005, arXiv:cs/0507025). Gerber, Chopin and Whiteley, Negative association, ordering and
convergence of resampling methods (Annals of Statistics 47, 2019; arXiv:1707.01845), for SSP.
Chopin and Papaspiliopoulos, An Introduction to Sequential Monte Carlo (2020), chapters 9 and 10.
"""

import difflib
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Bool, Float, Float64, Int, Int64
from torch import Generator, Tensor

Generators = Generator | list[Generator] | None

_BELOW_ONE = math.nextafter(1.0, 0.0)
_SNAP = 1e-9  # k W_j this close to an integer is that integer; exp and log leave about 1e-13


def _check_log_weights(log_weights: Float[Tensor, "p k"]) -> None:
    bad = log_weights.isnan() | (log_weights == math.inf)
    if bad.any():
        row, particle = bad.nonzero()[0].tolist()
        raise ValueError(
            f"log-weight of row {row}, particle {particle} is {log_weights[row, particle].item()}; "
            "expected a finite number, or -inf for weight zero. Check the reward of that sample."
        )


def log_normalise(
    log_weights: Float[Tensor, "p k"],
) -> tuple[Float64[Tensor, "p k"], Float64[Tensor, " p"]]:
    """Return `(log_W, log_mean)`: normalised log-weights, and the log of each row's mean weight.

    An entry may be -inf (weight zero). A row of nothing but -inf has no normalised weights: it
    gets uniform ones, and its `log_mean` of -inf records that the population is dead.

    Raises:
        ValueError: an entry is NaN or +inf; the message names its row and particle.
    """
    _check_log_weights(log_weights)
    log_w, k = log_weights.double(), log_weights.shape[1]
    top = log_w.amax(dim=1, keepdim=True)
    top = torch.where(top.isinf(), 0.0, top)  # -inf - -inf would be NaN
    shifted = log_w - top
    total = shifted.exp().sum(dim=1, keepdim=True)
    log_W = torch.where(total == 0, -math.log(k), shifted - total.log())
    # log(total / k) rather than a difference of logs: equal weights then give 0 exactly.
    return log_W, (top + (total / k).log()).squeeze(1)


def ess(log_weights: Float[Tensor, "p k"]) -> Float64[Tensor, " p"]:
    """Return each row's effective sample size 1 / sum_j W_j^2, in [1, k].

    k means equal weights, 1 that one particle has all the weight. A row of nothing but -inf counts
    as uniform (see `log_normalise`), hence k: resampling cannot improve it.

    Raises:
        ValueError: an entry is NaN or +inf.
    """
    log_W, _ = log_normalise(log_weights)
    return log_W.exp().square().sum(dim=1).reciprocal().clamp(1.0, log_weights.shape[1])


def _check_generators(generator: Generators, p: int) -> None:
    if isinstance(generator, list) and len(generator) != p:
        raise ValueError(
            f"got a list of {len(generator)} generators for {p} rows; expected one per row"
        )


def _uniforms(W: Float64[Tensor, "p k"], n: int, generator: Generators) -> Float64[Tensor, "p n"]:
    p = W.shape[0]
    _check_generators(generator, p)
    options = {"dtype": torch.float64}
    if isinstance(generator, list):
        # Moved row by row, since each row's generator has its own device.
        draws = [torch.rand(n, generator=g, device=g.device, **options) for g in generator]
        return torch.stack([row.to(W.device) for row in draws])
    device = W.device if generator is None else generator.device
    return torch.rand(p, n, generator=generator, device=device, **options).to(W.device)


def _inverse_cdf(W: Float64[Tensor, "p k"], points: Float64[Tensor, "p n"]) -> Int64[Tensor, "p n"]:
    # Rounding can leave the last cumulative sum below 1, and push a point up to 1. Scaling and
    # clamping keep every index below k, and off a last particle that has weight zero. The running
    # maximum repairs parallel cumulative sums, which need not be monotone.
    cdf = W.cumsum(dim=1).cummax(dim=1).values
    return torch.searchsorted(cdf / cdf[:, -1:], points.clamp(max=_BELOW_ONE), right=True)


def _slots(W: Float64[Tensor, "p k"]) -> Int64[Tensor, "p k"]:
    return torch.arange(W.shape[1], device=W.device).repeat(W.shape[0], 1)


def _from_offspring(counts: Int64[Tensor, "p k"]) -> Int64[Tensor, "p k"]:
    return torch.searchsorted(counts.cumsum(dim=1), _slots(counts.double()), right=True)


def _split(W: Float64[Tensor, "p k"]) -> tuple[Int64[Tensor, "p k"], Float64[Tensor, "p k"]]:
    # k W as integer and fraction. Without the snap, equal weights that round to kW = 1 - 1e-16
    # have no integer part at all, and residual resampling turns into multinomial.
    scaled = W.shape[1] * W
    nearest = scaled.round()
    scaled = torch.where((scaled - nearest).abs() < _SNAP, nearest, scaled)
    whole = scaled.floor()
    return whole.long(), scaled - whole


def multinomial(W: Float64[Tensor, "p k"], generator: Generators = None) -> Int64[Tensor, "p k"]:
    """k independent draws from W. The reference scheme; it adds the most noise."""
    return _inverse_cdf(W, _uniforms(W, W.shape[1], generator).sort(dim=1).values)


def residual(W: Float64[Tensor, "p k"], generator: Generators = None) -> Int64[Tensor, "p k"]:
    """floor(k W_j) copies of each particle, and multinomial draws for the slots left over."""
    counts, fraction = _split(W)
    left = W.shape[1] - counts.sum(dim=1, keepdim=True)
    draws = _uniforms(W, W.shape[1], generator)
    # A row with nothing left has no residual distribution; it draws from W and uses none of it.
    drawn = _inverse_cdf(torch.where(left > 0, fraction, W), draws)
    counts = counts.scatter_add(1, drawn, (_slots(W) < left).long())
    return _from_offspring(counts)


def stratified(W: Float64[Tensor, "p k"], generator: Generators = None) -> Int64[Tensor, "p k"]:
    """One uniform point in each stratum [n/k, (n+1)/k), through the inverse cdf of W."""
    k = W.shape[1]
    return _inverse_cdf(W, (_uniforms(W, k, generator) + _slots(W)) / k)


def systematic(W: Float64[Tensor, "p k"], generator: Generators = None) -> Int64[Tensor, "p k"]:
    """As stratified, with one uniform offset shared by all strata."""
    return _inverse_cdf(W, (_uniforms(W, 1, generator) + _slots(W)) / W.shape[1])


def ssp(W: Float64[Tensor, "p k"], generator: Generators = None) -> Int64[Tensor, "p k"]:
    """Srinivasan sampling process: round k W_j up or down by a chain of fair pairwise duels.

    One `open` particle with fraction a meets the next, with fraction b. If a + b < 1, one of them
    takes all of it and the other rounds down; otherwise one rounds up and the other keeps
    a + b - 1. Odds are such that expectations stay, and the unsettled particle goes on.
    """
    p, k = W.shape
    counts, fraction = _split(W)
    draws = _uniforms(W, k - 1, generator)
    open_ = torch.zeros(p, 1, dtype=torch.int64, device=W.device)
    a = fraction[:, :1]
    for j in range(1, k):
        b, rival = fraction[:, j : j + 1], torch.full_like(open_, j)
        up = a + b >= 1
        # Probability that the open particle wins: takes the sum, or rounds up.
        share = torch.where(up, (1 - b) / (2 - a - b), a / (a + b).clamp(min=1e-300))
        wins = draws[:, j - 1 : j] < share
        counts = counts.scatter_add(1, torch.where(wins, open_, rival), up.long())
        open_ = torch.where(wins ^ up, open_, rival)  # who rounds up is settled; so is a loser
        a = torch.where(up, a + b - 1, a + b)
    # What is left of the last fraction is 0 or 1 up to rounding; the total decides which.
    counts = counts.scatter_add(1, open_, k - counts.sum(dim=1, keepdim=True))
    return _from_offspring(counts)


RESAMPLERS: dict[str, Callable[[Tensor, Generators], Tensor]] = {
    "multinomial": multinomial,
    "residual": residual,
    "stratified": stratified,
    "systematic": systematic,
    "ssp": ssp,
}
"""Scheme name -> function of `(W, generator)` to ancestors `(p, k)`, non-decreasing in a row."""


def _resampler(scheme: str) -> Callable[[Tensor, Generators], Tensor]:
    if scheme not in RESAMPLERS:
        near = difflib.get_close_matches(scheme, RESAMPLERS, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ValueError(
            f"no resampling scheme {scheme!r}; there are {', '.join(RESAMPLERS)}.{hint}"
        )
    return RESAMPLERS[scheme]


def resample(
    log_weights: Float[Tensor, "p k"], scheme: str = "systematic", generator: Generators = None
) -> Int64[Tensor, "p k"]:
    """Draw ancestors for every row. A row of nothing but -inf is resampled uniformly.

    Raises:
        ValueError: unknown scheme (near matches are listed), a NaN or +inf log-weight, or a list
            of generators that does not have one per row.
    """
    resampler = _resampler(scheme)
    log_W, _ = log_normalise(log_weights)
    return resampler(log_W.exp(), generator)


@dataclass
class SMCState:
    """Weights, evidence and lineage of p populations of k particles.

    Per step: `reweight`, then `resample(should_resample(...))`, then `gather_particles` on all
    per-particle state with the ancestors returned. At the end the weights that remain belong to
    the particles: the target is the *weighted* population.
    """

    log_weights: Float64[Tensor, "p k"]  # accumulated since the row was last resampled
    log_z: Float64[Tensor, " p"]  # log of the mean weights of past resamplings
    roots: Int64[Tensor, "p k"]  # index, in the initial population, each particle descends from
    ancestors: list[Int64[Tensor, "p k"]] = field(default_factory=list)  # per call of `resample`
    ess_history: list[Float64[Tensor, " p"]] = field(default_factory=list)  # just before each

    @classmethod
    def init(cls, p: int, k: int, device: torch.device | str = "cpu") -> "SMCState":
        """Equal weights, log Z = 0, every particle its own root."""
        if p < 1 or k < 1:
            raise ValueError(f"got {p} populations of {k} particles; both must be at least 1")
        log_weights = torch.zeros(p, k, dtype=torch.float64, device=device)
        return cls(log_weights, log_weights.new_zeros(p), _slots(log_weights))

    def reweight(self, log_increment: Float[Tensor, "p k"]) -> None:
        """Add to the log-weights. The increment is detached: a state holds no autograd graph.

        Raises:
            ValueError: wrong shape, or an entry that is NaN or +inf.
        """
        if log_increment.shape != self.log_weights.shape:
            raise ValueError(
                f"log_increment has shape {tuple(log_increment.shape)}; this state holds "
                f"(rows, particles) = {tuple(self.log_weights.shape)}"
            )
        _check_log_weights(log_increment)
        # Device first: the increment's own device may have no float64.
        self.log_weights = (
            self.log_weights + log_increment.detach().to(self.log_weights.device).double()
        )

    def ess(self) -> Float64[Tensor, " p"]:
        """Effective sample size of each row; see the function `ess`."""
        return ess(self.log_weights)

    def should_resample(self, threshold: float | None) -> Bool[Tensor, " p"]:
        """Rows whose ESS is at most `threshold * k`. None and 1.0 mean every row, 0.0 none.

        Raises:
            ValueError: `threshold` is not within [0, 1].
        """
        if threshold is None:
            return torch.ones_like(self.log_z, dtype=torch.bool)
        if not 0.0 <= threshold <= 1.0:
            raise ValueError(
                f"ESS threshold is {threshold}; expected a fraction of the number of particles "
                "between 0 and 1, or None to resample always"
            )
        return self.ess() <= threshold * self.log_weights.shape[1] * (1 + 1e-9)

    def resample(
        self, mask: Bool[Tensor, " p"], scheme: str = "systematic", generator: Generators = None
    ) -> Int64[Tensor, "p k"]:
        """Resample the rows in `mask` and return the ancestors of all rows.

        Other rows get the identity, keep their log-weights and draw no random numbers. Call it at
        each resampling opportunity even if no row is in `mask`, so that the histories are complete.

        Raises:
            ValueError: as the function `resample`, or a mask that is not one entry per row.
        """
        _resampler(scheme)
        p = self.log_z.shape[0]
        _check_generators(generator, p)
        if mask.shape != self.log_z.shape:
            raise ValueError(f"mask has shape {tuple(mask.shape)}; expected ({p},)")
        mask = mask.to(self.log_z.device)
        rows = mask.nonzero().flatten()
        ancestors = _slots(self.log_weights)
        self.ess_history.append(self.ess())
        if len(rows):
            if isinstance(generator, list):
                generator = [generator[row] for row in rows.tolist()]
            ancestors[rows] = resample(self.log_weights[rows], scheme, generator)
        self.log_z = torch.where(mask, self.log_evidence(), self.log_z)
        self.log_weights = torch.where(mask[:, None], 0.0, self.log_weights)
        self.roots = self.roots.gather(1, ancestors)
        self.ancestors.append(ancestors)
        return ancestors

    def log_evidence(self) -> Float64[Tensor, " p"]:
        """Log of the unbiased estimate of Z; -inf for a population that died."""
        return self.log_z + log_normalise(self.log_weights)[1]

    def num_roots(self) -> Int64[Tensor, " p"]:
        """Number of distinct initial particles with living descendants (weight zero included)."""
        ordered = self.roots.sort(dim=1).values
        return 1 + (ordered[:, 1:] != ordered[:, :-1]).sum(dim=1)


def flat_indices(ancestors: Int[Tensor, "p k"]) -> Int64[Tensor, " p*k"]:
    """Ancestors as indices into a leading dimension of p*k, row-major: `row * k + ancestor`.

    Raises:
        ValueError: an ancestor outside 0..k-1, which would reach into another row.
    """
    p, k = ancestors.shape
    if ((ancestors < 0) | (ancestors >= k)).any():
        raise ValueError(f"an ancestor lies outside 0..{k - 1} and would cross into another row")
    offsets = torch.arange(p, device=ancestors.device)[:, None] * k
    return (offsets + ancestors).flatten()


def gather_particles(tree: Any, ancestors: Int[Tensor, "p k"]) -> Any:
    """Permute per-particle state: slot n of row r becomes what `ancestors[r, n]` of row r was.

    The one function that does so; pass everything a particle carries through it, in one call.
    `tree` is a Tensor with leading dimension p*k (row-major), an object with `.take(indices)`, or
    None, or a list, tuple or dict of these. The result is new; the input stays as it was.

    Raises:
        ValueError: a leaf does not have p*k entries.
        TypeError: a leaf of another kind, such as a number, a string or an array.
    """
    return _gather(tree, flat_indices(ancestors), "state")


def _gather(tree: Any, indices: Int64[Tensor, " n"], where: str) -> Any:
    if tree is None:
        return None
    # An array's own `take` flattens it first: silently wrong, so arrays are refused below.
    if isinstance(tree, Tensor) or (hasattr(tree, "take") and not hasattr(tree, "__array__")):
        scalar = isinstance(tree, Tensor) and tree.ndim == 0
        got = 0 if scalar else len(tree) if hasattr(tree, "__len__") else len(indices)
        if got != len(indices):
            raise ValueError(
                f"{where} has {got} entries for {len(indices)} particles; it needs one for each, "
                "so repeat per-row state k times first"
            )
        if isinstance(tree, Tensor):
            return tree.index_select(0, indices.to(tree.device))
        return tree.take(indices)
    if isinstance(tree, dict):
        return {name: _gather(leaf, indices, f"{where}[{name!r}]") for name, leaf in tree.items()}
    if isinstance(tree, list | tuple):
        leaves = [_gather(leaf, indices, f"{where}[{i}]") for i, leaf in enumerate(tree)]
        return type(tree)(*leaves) if hasattr(tree, "_fields") else type(tree)(leaves)
    raise TypeError(
        f"{where} is a {type(tree).__name__}; expected a Tensor, an object with .take(indices), "
        "None, or a list, tuple or dict of these. Leave out what particles share."
    )
