"""The processes of a run, which may be one.

Every process rolls out and differentiates its own rows; what is small, such as matrices of
log-probabilities, all of them see whole. So a loss over groups needs no rule about who has which
sample, and gives the same numbers whatever the number of processes.
"""

from __future__ import annotations

import atexit
import warnings
from collections.abc import Iterable
from functools import cache
from typing import Any

import torch
import torch.distributed as dist
from accelerate import PartialState
from torch import Tensor
from torch.distributed.tensor import DTensor


class Team:
    """What the engine asks of accelerate's launcher.

    Args:
        device: of this process.
        shard: share the network out over the processes.

    Attributes:
        rank: of this process, 0 to ``size - 1``.
        size: number of processes.
        shard: the network is shared out, so that all processes must make each call of it together.

    Raises:
        ValueError: there are several processes, and this one has another's device.
    """

    shard: bool = False

    def __init__(self, device: torch.device, shard: bool = False) -> None:
        # its state is global, and an `Accelerator` would fix the precision of all later runs
        known = bool(PartialState._shared_state)
        self.state = PartialState() if known else PartialState(cpu=device.type == "cpu")
        self.rank, self.size = self.state.process_index, self.state.num_processes
        if self.size > 1 and device.type == "cuda" and device != self.state.device:
            raise ValueError(
                f"the model of process {self.rank} is on {device}, and its device is "
                f"{self.state.device}; load it with device={str(self.state.device)!r}"
            )
        if self.size > 1:
            _leave_at_exit()
        self.shard = shard and self.size > 1
        if shard and not self.shard:
            warnings.warn(
                "shard shares the network out over processes, and there is one: it stays whole. "
                "Start several with torchrun or accelerate launch",
                stacklevel=2,
            )

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def rows(self, n: int) -> range:
        """Which of n rows are this process's: a contiguous share; shares differ by one at most."""
        share, more = divmod(n, self.size)
        start = self.rank * share + min(self.rank, more)
        return range(start, start + share + (self.rank < more))

    def gather(self, value: Any) -> list[Any]:
        """The value of every process, by rank, on every process; tensors arrive on the CPU."""
        if isinstance(value, Tensor):
            value = value.detach().cpu()
        if self.size == 1:
            return [value]
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, value)
        return found

    def cat(self, rows: Tensor) -> Tensor:
        """All rows, in order, on every process and its device, from each process's own."""
        return torch.cat(self.gather(rows)).to(rows.device)

    def sum_gradients(self, parameters: Iterable[Tensor]) -> None:
        """Replace each gradient by its sum over the processes; one message per dtype.

        Those of parameters that are shared out have been averaged in the backward pass.
        """
        if self.size == 1:
            return
        parameters = list(parameters)
        for p in parameters:
            if p.grad is None:  # this process had no rows with a gradient
                p.grad = torch.zeros_like(p)
            if isinstance(p.grad, DTensor):
                p.grad.mul_(self.size)
        parameters = [p for p in parameters if not isinstance(p.grad, DTensor)]
        for dtype in sorted({p.grad.dtype for p in parameters}, key=str):
            grads = [p.grad for p in parameters if p.grad.dtype == dtype]
            flat = torch.cat([g.flatten() for g in grads])
            dist.all_reduce(flat)
            for g, part in zip(grads, flat.split([g.numel() for g in grads]), strict=True):
                g.copy_(part.view_as(g))

    def any(self, flag: bool) -> bool:
        """Whether the flag is set anywhere."""
        return any(self.gather(flag))

    def wait(self) -> None:
        """Until all processes are here."""
        self.state.wait_for_everyone()


@cache
def _leave_at_exit() -> None:
    """Have the process leave its group before it ends.

    Where gloo's threads are still there when the interpreter goes, they can abort it, so that a run
    that is done ends as if it had failed.
    """

    def leave() -> None:
        if dist.is_initialized() and dist.get_backend() == "gloo":
            dist.destroy_process_group()

    atexit.register(leave)
