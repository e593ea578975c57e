"""A DDIM chain with a linear network, whose gradients are known in closed form.

The network's output at x[i] is w[i] x + b[i] c, c the number that is the prompt, in float64; every
step has parameters of its own, so that a gradient says which steps it came from. With DDIM's mean
P x + Q output (from its equation 12, written out here once more),

    x[i+1] = A x[i] + Q b[i] c + std z,    A = P + Q w[i].

The reward is -|x - c|^2 / 2 + offset.
"""

import torch

from diffreward.policies.gaussian import DDIM, GaussianPolicy
from diffreward.policy import Condition, randn, sample_generators
from diffreward.rewards import as_reward, evaluate
from diffreward.samples import Samples

ALPHA_BAR = (0.05, 0.2, 0.45, 0.7, 0.9)


class Network(torch.nn.Module):
    def __init__(self, num_steps: int) -> None:
        super().__init__()
        g = torch.Generator().manual_seed(0)
        draw = torch.randn(2, num_steps, generator=g, dtype=torch.float64)
        self.w = torch.nn.Parameter(0.3 + 0.2 * draw[0])
        self.b = torch.nn.Parameter(0.5 * draw[1])
        self.calls = []  # (step, rows, whether a graph was recorded)

    def forward(self, x, i, centre):
        self.calls.append((i, len(x), torch.is_grad_enabled()))
        return self.w[i] * x + self.b[i] * centre


class LinearChain(GaussianPolicy):
    def __init__(self, eta=0.0, alpha_bar=ALPHA_BAR, end=1.0, dim=2) -> None:
        ab = torch.tensor(alpha_bar, dtype=torch.float64)
        after = torch.cat([ab[1:], torch.tensor([end], dtype=torch.float64)])
        t = torch.arange(len(ab)).flip(0)
        self.kernel = DDIM(t, ab, after, ab.flip(0), eta=eta)
        self.denoiser, self.dim = Network(len(ab)), dim
        self.a, self.s = ab.sqrt(), (1 - ab).sqrt()
        self.std = eta * ((1 - after) / (1 - ab) * (1 - ab / after)).sqrt()
        self.P = after.sqrt() / self.a
        self.Q = (1 - after - self.std**2).clamp(min=0).sqrt() - after.sqrt() * self.s / self.a

    def encode(self, prompts, **inputs):
        centre = torch.tensor([[float(p)] for p in prompts], dtype=torch.float64)
        return Condition(list(prompts), {"centre": centre})

    def latent_shape(self, condition):
        return (self.dim,)

    def initial(self, condition, generator=None):
        return randn((len(condition), self.dim), generator, dtype=torch.float64)

    def predict(self, x, t, condition):
        return self.denoiser(x, self.num_steps - 1 - int(t[0]), condition.tensors["centre"])

    def decode(self, x0, condition):
        return Samples(x0, "toy", list(condition.prompts))

    def path(self, centre, x, z):
        """x[0..T] for noise z[i], in closed form."""
        w, b = self.denoiser.w.detach(), self.denoiser.b.detach()
        xs = [x]
        for i in range(self.num_steps):
            drift = (self.P[i] + self.Q[i] * w[i]) * xs[-1] + self.Q[i] * b[i] * centre
            xs.append(drift + self.std[i] * z[i])
        return xs

    def reward_gradient(self, centre, xs, first):
        """d reward / d (w, b) of each sample, ``(b, 2, T)``, through the steps i >= ``first``."""
        w = self.denoiser.w.detach()
        out = torch.zeros(len(centre), 2, self.num_steps, dtype=torch.float64)
        flow = -(xs[-1] - centre)  # d reward / d x[i + 1]
        for i in reversed(range(self.num_steps)):
            on = (i >= torch.as_tensor(first)).double()
            out[:, 0, i] = on * (flow * self.Q[i] * xs[i]).sum(1)
            out[:, 1, i] = on * (flow * self.Q[i] * centre).sum(1)
            flow = flow * (self.P[i] + self.Q[i] * w[i])
        return out

    def gradient(self):
        """What backward left on the network, ``(2, T)``; clears it."""
        grads = [p.grad for p in (self.denoiser.w, self.denoiser.b)]
        self.denoiser.zero_grad()
        return torch.stack([torch.zeros_like(self.s) if g is None else g for g in grads])


def quadratic(offset=0.0):
    def reward(samples):
        centre = torch.tensor([[float(p)] for p in samples.prompts], dtype=torch.float64)
        return offset - ((samples.data - centre) ** 2).sum(1) / 2

    return as_reward(reward)


def scorer(reward=None):
    reward = reward or quadratic()
    return lambda samples: evaluate(reward, samples)


def noise(num_samples, draws, dim=2, seed=0):
    """The ``draws`` first draws of every sample's generator: x[0], z[0], z[1], ..."""
    generators = sample_generators(seed, 1, num_samples)
    return [randn((num_samples, dim), generators, dtype=torch.float64) for _ in range(draws)]


def prompts(num_samples):
    return [f"{0.5 * j - 0.7:.2f}" for j in range(num_samples)]


def gradients(algorithm, policy, names, score=None, seed=0, split=None):
    """Gradient of each sample's loss, ``(b, 2, T)``, and the losses; in batches of ``split``."""
    generators = sample_generators(seed, 1, len(names))
    out, losses = [], []
    for start in range(0, len(names), split or len(names)):
        stop = start + (split or len(names))
        condition = policy.encode(names[start:stop])
        loss, samples, scores = algorithm.loss(
            policy, condition, generators[start:stop], score or scorer()
        )
        assert len(samples) == len(scores) == len(loss) == len(condition)
        assert not scores.value.requires_grad and not samples.data.requires_grad
        for j in range(len(loss)):
            loss[j].backward(retain_graph=True)
            out.append(policy.gradient())
        losses.append(loss.detach())
    return torch.stack(out), torch.cat(losses)
