"""What a run costs, counted in samples through the networks."""

from collections.abc import Iterator, Mapping, Sequence

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
        tensors = list(_tensors(output))  # of a ControlNet several, not all with a gradient
        if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
            self.backward += len(tensors[0])
        else:
            self.forward += len(tensors[0])

    def counts(self) -> list[int]:
        """Rows without gradient, and with: the latter cost about three times as much."""
        return [self.forward, self.backward]

    def restore(self, counts: Sequence[int]) -> None:
        self.forward, self.backward = counts


def _tensors(output) -> Iterator[Tensor]:
    if isinstance(output, Tensor):
        yield output
    elif output is not None:
        for part in output.values() if isinstance(output, Mapping) else output:
            yield from _tensors(part)
