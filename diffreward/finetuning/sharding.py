"""A network shared out over the processes: FSDP2, `torch.distributed.fsdp.fully_shard`.

Each process keeps a part of every weight. The weights of a block come together for its forward
pass and again for its backward pass, and go. So a network call is work of *all* processes, and who
makes one that the others do not make waits for them forever. The engine makes as many on each;
`Lockstep` sees to it where their number is up to the algorithm.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils.checkpoint import checkpoint as checkpointed

from diffreward.finetuning.team import Team
from diffreward.policy import Condition, Policy, StepLaw

NEEDED = (2, 8)  #: of torch; older ones keep layers that are in no block, past an update even


def share_out(network: nn.Module, device: torch.device) -> None:
    """Leave this process its part of each parameter, which becomes a `DTensor`, in place.

    What comes together at a time: each entry of the network's outermost lists of blocks
    (``transformer_blocks``, ``down_blocks``, ...: any ``torch.nn.ModuleList``), and all the rest.
    A block must be called as a module, ``block(x)``, and so must the network. Buffers, and
    parameters that are added later, stay whole.

    Args:
        network: the same on every process.
        device: of this process, to which the parts go.

    Raises:
        RuntimeError: torch is too old.
    """
    if tuple(int(n) for n in torch.__version__.split(".")[:2]) < NEEDED:
        raise RuntimeError(
            f"training.shard needs torch {'.'.join(map(str, NEEDED))} or newer, and this is "
            f"{torch.__version__}"
        )
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    for block in [*_blocks(network), network]:
        fully_shard(block, mesh=mesh, reshard_after_forward=True)


def _blocks(module: nn.Module) -> Iterator[nn.Module]:
    for child in module.children():
        container = isinstance(child, (nn.ModuleList, nn.ModuleDict))  # which is never called
        if not isinstance(module, nn.ModuleList) or container:
            yield from _blocks(child)
        elif next(child.parameters(), None) is not None:
            yield child


def whole(tensors: Mapping[str, Tensor], keep: bool) -> dict[str, Tensor]:
    """Put tensors together that are shared out; all processes take part.

    Args:
        tensors: the same names, in the same order, on every process.
        keep: whether this process wants them; they come into the main memory.
    """
    found = {}
    for name, t in tensors.items():
        if isinstance(t, DTensor):
            t = t.full_tensor()
            t = t.to("cpu", copy=True) if keep else t  # it may be a view of something padded
        if keep:
            found[name] = t
    return found


def part(tensor: Tensor, like: Tensor) -> Tensor:
    """The part of a whole tensor that this process has of ``like``; all processes take part."""
    if not isinstance(like, DTensor):
        return tensor
    return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements)


def local(tensor: Tensor) -> Tensor:
    """What this process has of a tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


@contextmanager
def gathered(network: nn.Module, keep: bool) -> Iterator[None]:
    """To save a network: it gives whole weights, and is of its own class again.

    Args:
        network: from `share_out`, on all processes.
        keep: whether this process saves it.
    """
    state = whole(network.state_dict(), keep)
    hook = network.register_state_dict_post_hook(
        lambda module, found, prefix, metadata: found.update(state)
    )
    sharded = network.__class__  # a subclass that `fully_shard` made of FSDPModule and the class
    network.__class__ = sharded.__mro__[2]
    try:
        yield
    finally:
        network.__class__ = sharded
        hook.remove()


class Lockstep:
    """Matches the calls of policies whose network is shared out.

    Before a call, the processes tell each other what they are about to do. Whose turn it is not, or
    who has nothing left to do, takes part with a sample that counts for nothing.

    Args:
        team: the processes.
        policies: with a network each, or in common.
        condition: of at least one sample.
        recomputed: calls with gradients are made in `torch.utils.checkpoint`, so that the backward
            pass makes them again.

    Attributes:
        policies: the same, matched.
    """

    def __init__(
        self, team: Team, policies: Sequence[Policy], condition: Condition, recomputed: bool = False
    ) -> None:
        self.team, self.recomputed, self.finished = team, recomputed, False
        self.condition = condition.take([0])
        self._plain = list(policies)
        self.policies = [_Matched(self, n, policy) for n, policy in enumerate(policies)]
        self._idle: list[Tensor] = []

    def finish(self) -> Tensor | float:
        """Wait until the others have made their calls.

        Returns:
            0, to be added to the loss, so that the backward passes match, too.
        """
        self._turn(None)
        self.finished = True
        return sum(self._idle, 0.0)

    def turn(self, number: int, x: Tensor) -> None:
        """Come back when it is the turn of calls like that of a policy, by its number, at x."""
        grad = torch.is_grad_enabled()
        # a backward pass down to x goes through blocks that others would not need
        self._turn((number, grad, grad and x.requires_grad))

    def reach(self, output: Tensor) -> None:
        """The backward pass is to reach a call whether or not the loss depends on it."""
        if torch.is_grad_enabled():
            self._idle.append(0.0 * output.sum())

    def _turn(self, mine: tuple[int, bool, bool] | None) -> None:
        if self.finished:  # recomputed in the backward pass, in whose order all agree
            return
        while True:
            wishes = [wish for wish in self.team.gather(mine) if wish is not None]
            now = max(wishes, default=None)
            if mine == now:
                return
            self._join(*now)

    def _join(self, number: int, grad: bool, to_x: bool) -> None:
        policy = self._plain[number]
        with torch.set_grad_enabled(grad):
            x = policy.initial(self.condition, torch.Generator().manual_seed(0))
            given = (x.requires_grad_(to_x), policy.num_steps - 1, self.condition)
            if grad and self.recomputed:
                law = checkpointed(policy.step_law, *given, use_reentrant=False)
            else:
                law = policy.step_law(*given)
            if grad:
                self._idle.append(0.0 * law.x0.sum())


class _Matched:
    """A policy each of whose calls waits for its turn."""

    def __init__(self, lockstep: Lockstep, number: int, policy: Policy) -> None:
        for name in ("num_steps", "device", "encode", "initial", "decode"):
            setattr(self, name, getattr(policy, name))
        self._lockstep, self._number, self._policy = lockstep, number, policy

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_policy"], name)

    def reference(self) -> Policy:
        return self._lockstep.policies[-1]

    def step_law(self, x: Tensor, i: int, condition: Condition) -> StepLaw:
        self._lockstep.turn(self._number, x)
        return self._policy.step_law(x, i, condition)

    def denoise(self, x0: Tensor, u: Tensor, eps: Tensor, condition: Condition):
        self._lockstep.turn(self._number, x0)
        prediction, error = self._policy.denoise(x0, u, eps, condition)
        self._lockstep.reach(prediction)
        return prediction, error

    def denoising_loss(self, x0: Tensor, condition: Condition, generator=None) -> Tensor:
        self._lockstep.turn(self._number, x0)
        return self._policy.denoising_loss(x0, condition, generator)
