"""A linear-Gaussian chain with a trainable drift and known optima, and a plain training loop.

x[0] ~ N(c, 1), x[k+1] = (a[k] + gain[k]) x[k] + b[k] + shift[k] + sigma[k] z[k], c the prompt. With
A[k] = prod_{j >= k} a[j], the reward w x[T] and gain 0:

    E[r]            = w (A[0] c + sum_k A[k+1] (b[k] + shift[k]))
    KL              = sum_k shift[k]^2 / (2 sigma[k]^2)
    shift* [k]      = sigma[k]^2 (w / beta) A[k+1]     maximises E[r] - beta KL

`quadrature` replaces every normal number by all combinations of a few values, equally many of each,
so that sums over its rows *are* expectations of polynomials of a low degree.
"""

import copy
import itertools
import math

import torch
from torch import Tensor, nn
from toys import NormalLaw, Toy, draw

from diffreward.algorithms import History
from diffreward.policy import Trajectory, path_log_prob, rollout
from diffreward.rewards import Scores

TWO = (-1.0, 1.0)  # exact up to degree 3 in each variable
SIX = (-math.sqrt(3), 0.0, 0.0, 0.0, 0.0, math.sqrt(3))  # Gauss-Hermite 1/6, 2/3, 1/6: degree 5


class Drift(nn.Module):
    def __init__(self, num_steps: int, gain: bool) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.zeros(num_steps, dtype=torch.float64))
        zero = torch.zeros(num_steps, dtype=torch.float64)
        self.gain = nn.Parameter(zero, requires_grad=gain)

    def forward(self, x: Tensor, i: int) -> Tensor:
        return self.gain[i] * x + self.shift[i]


class LinearChain(Toy):
    """``gain``: whether the gains are trained, too."""

    def __init__(
        self, a=(0.9, 0.6, 0.8), b=(0.1, -0.2, 0.3), sigma=(0.5, 0.4, 0.3), gain: bool = False
    ) -> None:
        super().__init__(len(a))
        self.a, self.b, self.sigma = (torch.tensor(v, dtype=torch.float64) for v in (a, b, sigma))
        self.denoiser = Drift(len(a), gain)

    def initial(self, condition, generator=None):
        centre = condition.tensors["centre"]
        return centre + draw(torch.randn, centre.shape, generator)

    def law(self, x, i, condition):
        mean = self.a[i] * x + self.b[i] + self.denoiser(x, i)
        return NormalLaw(self.tail[i + 1] * mean, mean, self.sigma[i].item(), 1.0)

    def reference(self):
        ref = copy.copy(self)
        ref.denoiser = copy.deepcopy(self.denoiser).requires_grad_(False)
        return ref

    @property
    def shift(self) -> Tensor:
        return self.denoiser.shift

    @property
    def tail(self) -> Tensor:
        """A[0..T]"""
        return torch.cat([self.a, torch.ones(1, dtype=torch.float64)]).flip(0).cumprod(0).flip(0)

    def mean_end(self) -> Tensor:
        """E[x[T]] of prompt 0, gain 0."""
        return (self.tail[1:] * (self.b + self.shift.detach())).sum()

    def optimum(self, w: float, beta: float) -> Tensor:
        return self.sigma**2 * (w / beta) * self.tail[1:]


def quadrature(chain: LinearChain, size: int, nodes=TWO, *, shared: bool = False):
    """(trajectory, groups): groups of ``size`` with every combination of ``nodes`` as noise."""
    t = chain.num_steps
    count = 1 + size * t if shared else size * (1 + t)
    z = torch.tensor(list(itertools.product(nodes, repeat=count)), dtype=torch.float64)
    if shared:
        steps = z[:, 1:].reshape(len(z), size, t)
        z = torch.cat([z[:, :1, None].expand(-1, size, 1), steps], 2)
    z = z.reshape(-1, t + 1)
    condition = chain.encode(["0"] * len(z))
    path = [z[:, :1]]
    with torch.no_grad():
        for i in range(t):
            law = chain.step_law(path[-1], i, condition)
            path.append(law.mean + law.std * z[:, i + 1 : i + 2])
    return Trajectory(condition, path), torch.arange(len(z)) // size


def draws(chain: LinearChain, prompts: int, size: int, seed: int, *, shared: bool = False):
    """(trajectory, groups) at random."""
    g = torch.Generator().manual_seed(seed)
    groups = torch.arange(prompts).repeat_interleave(size)
    condition = chain.encode(["0"] * len(groups))
    x = chain.initial(condition, g)
    if shared:
        x = x[groups * size]
    with torch.no_grad():
        return rollout(chain, condition, g, x=x, keep_path=True), groups


def path_kl(chain, reference, trajectory) -> Tensor:
    x, c = trajectory.latents, trajectory.condition
    steps = range(chain.num_steps)
    laws = [(chain.step_law(x[i], i, c), reference.step_law(x[i], i, c)) for i in steps]
    return torch.stack([law.kl(ref) for law, ref in laws], 1)


def loss_of(algorithm, chain, reference, trajectory, groups, credited, old=None) -> Tensor:
    """The algorithm's loss on these trajectories, with its graph; on-policy without ``old``."""
    log_prob = path_log_prob(chain, trajectory)
    old = log_prob.detach() if old is None else old
    with torch.no_grad():
        ref = path_log_prob(reference, trajectory) if algorithm.needs_reference else None
    kl = path_kl(chain, reference, trajectory) if algorithm.needs_kl else None
    return algorithm.loss(log_prob, old, ref, credited, groups, kl)


def credit(algorithm, value, groups, std=None) -> Scores:
    prompts = [str(g) for g in groups.tolist()]
    return algorithm.credit(Scores(value, std), groups, prompts, History())


def gradient(algorithm, chain, reference, trajectory, groups, reward) -> Tensor:
    """Of the on-policy loss, by the shifts."""
    credited = credit(algorithm, reward(trajectory.final[:, 0]), groups)
    loss = loss_of(algorithm, chain, reference, trajectory, groups, credited)
    return torch.autograd.grad(loss, chain.shift)[0]


def train(
    algorithm, chain, reward, *, iterations=300, prompts=32, size=8, lr=0.05, sampler=draws
) -> LinearChain:
    """Adam with a learning rate that falls to 0; one rollout an iteration."""
    reference = chain.reference()
    optimizer = torch.optim.Adam(chain.denoiser.parameters(), lr=lr)
    for n in range(iterations):
        optimizer.param_groups[0]["lr"] = lr * (1 - n / iterations)
        trajectory, groups = sampler(chain, prompts, size, n, shared=algorithm.shared_noise)
        credited = credit(algorithm, reward(trajectory.final[:, 0]), groups)
        with torch.no_grad():
            old = path_log_prob(chain, trajectory)
        for _ in range(algorithm.passes):
            for rows in groups.unique().chunk(algorithm.minibatches):
                at = torch.isin(groups, rows).nonzero()[:, 0]
                part = Trajectory(
                    trajectory.condition.take(at), [x[at] for x in trajectory.latents]
                )
                optimizer.zero_grad()
                loss_of(
                    algorithm, chain, reference, part, groups[at], credited.take(at), old[at]
                ).backward()
                optimizer.step()
    return chain


def matrices(b: int, num_steps: int, seed: int = 0, scale: float = 1.0):
    """Random (log_prob with gradient, old, ref), float64: unlike the KL, ratios are arbitrary."""
    g = torch.Generator().manual_seed(seed)
    options = {"generator": g, "dtype": torch.float64}
    ref = -2 + torch.randn(b, num_steps, **options)
    old = ref + scale * torch.randn(b, num_steps, **options)
    new = old + scale * torch.randn(b, num_steps, **options)
    return new.requires_grad_(), old, ref
