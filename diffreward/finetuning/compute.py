"""What a run costs, counted in samples through the networks."""

from collections.abc import Sequence

import torch
from torch import Tensor


class Compute:
    """How many samples went through the networks: the honest measure of a run's cost."""

    def __init__(self, *networks: torch.nn.Module) -> None:
        self.forward = self.backward = 0
        self._hooks = [n.register_forward_hook(self._count) for n in dict.fromkeys(networks)]

    def close(self) -> None:
        """Stop counting."""
        for hook in self._hooks:
            hook.remove()

    def _count(self, network, inputs, output) -> None:
        while not isinstance(output, Tensor):  # of a ControlNet, lists of residuals
            output = output[0]
        if torch.is_grad_enabled() and output.requires_grad:
            self.backward += len(output)
        else:
            self.forward += len(output)

    def counts(self) -> list[int]:
        """Rows without gradient, and with: the latter cost about three times as much."""
        return [self.forward, self.backward]

    def restore(self, counts: Sequence[int]) -> None:
        self.forward, self.backward = counts
