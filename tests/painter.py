"""A policy that paints: exact diffusion of 16x16 pictures of one colour each, in ten lines.

Its latents are RGB colours, standard normal; the picture is their sigmoid all over.
"""

import torch

from diffreward.policies.gaussian import GaussianLaw
from diffreward.policy import Condition, randn
from diffreward.samples import Samples


class Painter:
    def __init__(self, num_steps=6, **options):
        self.num_steps, self.options, self.device = num_steps, options, torch.device("cpu")

    def encode(self, prompts, **inputs):
        self.inputs = inputs
        return Condition(list(prompts), {})

    def initial(self, condition, generator=None):
        return randn((len(condition), 3), generator)

    def step_law(self, x, i, condition):
        # an AR(1) chain whose last state given x is N(a x, 1 - a^2)
        keep, a = 0.8, 0.8 ** (self.num_steps - i)
        one = torch.ones(len(x), 1)
        return GaussianLaw(a * x, keep * x, (1 - keep**2) ** 0.5 * one, (1 - a**2) ** 0.5 * one)

    def decode(self, x0, condition):
        pictures = x0.sigmoid()[:, :, None, None].expand(-1, -1, 16, 16)
        return Samples(pictures.float(), "image", list(condition.prompts))

    def denoising_loss(self, x0, condition, generator=None):
        raise NotImplementedError("it is not trained")

    def reference(self):
        return self
