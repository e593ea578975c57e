"""Batch arithmetic: what fits together, and the nearest numbers that do."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Batches:
    """How samples are divided: over updates, processes and network calls.

    Attributes:
        prompts: in one update.
        samples: of each prompt.
        updates: of one pass through a rollout.
        processes: that share the work.
        max_batch: most samples in one network call; None: all of a process at once.
        num_prompts: there are to choose from.

    Raises:
        ValueError: numbers that do not fit, with the nearest that do.
    """

    prompts: int
    samples: int
    updates: int
    processes: int
    max_batch: int | None
    num_prompts: int

    def __post_init__(self) -> None:
        numbers = {
            "prompts_per_update": self.prompts,
            "samples_per_prompt": self.samples,
            "minibatches": self.updates,
            "max_batch": self.max_batch,
        }
        for name, number in numbers.items():
            if number is not None and number < 1:
                raise ValueError(f"{name} must be at least 1, but {number} came")
        if self.prompts * self.updates > self.num_prompts:
            most = self.num_prompts // self.updates
            raise ValueError(
                f"a rollout takes {self.updates} x {self.prompts} different prompts, but there are "
                f"{self.num_prompts}; "
                + (
                    f"set prompts_per_update to at most {most}"
                    if most
                    else f"give at least {self.updates} prompts, or take fewer minibatches"
                )
            )
        if self.per_update % self.processes:
            fit = [n for n in range(1, 4096) if n * self.samples % self.processes == 0]
            near = sorted(sorted(fit, key=lambda n: abs(n - self.prompts))[:2])
            raise ValueError(
                f"{self.prompts} prompts x {self.samples} samples = {self.per_update} samples per "
                f"update cannot be shared equally by {self.processes} processes; set "
                f"prompts_per_update to {' or '.join(map(str, near))}, or samples_per_prompt to a "
                f"multiple of {self.processes}"
            )

    @property
    def per_update(self) -> int:
        return self.prompts * self.samples

    @property
    def total(self) -> int:
        """Samples of a rollout, of all processes."""
        return self.per_update * self.updates

    def __str__(self) -> str:
        share = self.per_update // self.processes
        calls = -(-share // (self.max_batch or share))
        text = f"{self.prompts} prompts x {self.samples} samples = {self.per_update} per update"
        if self.updates > 1:
            text += f", {self.updates} updates per pass through a rollout of {self.total}"
        if self.processes > 1:
            text += f", {share} on each of {self.processes} processes"
        if calls > 1:
            text += f", in {calls} network calls of at most {self.max_batch}"
        return text
