"""The one training engine: collect samples, ask the algorithm for a loss, step.

A loss on whole trajectories would need the activations of all T steps at once. It is a function of
the ``(b, T)`` log-probabilities alone, though, so its exact gradient comes in two passes:

1. without gradients, the matrix log p[b, t]; the loss on it; its gradient c[b, t] by autograd;
2. step by step, the backward pass of sum_b c[b, t] log p[b, t], with the activations of one step.

The matrices are small, so every process sees those of all (`Team`): groups of one prompt meet
whatever the number of processes, and memory decides about pieces (``max_batch``), not the result.
"""

from __future__ import annotations

import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from jaxtyping import Float, Int
from torch import Tensor

from diffreward.algorithms import Algorithm, History, make_algorithm
from diffreward.controlled import ControlledImages, read_controlled
from diffreward.files import environment, plain
from diffreward.finetuning.checkpoint import (
    MAY_DIFFER,
    check_same,
    describe,
    digest,
    load_checkpoint,
    load_optimizer_tensors,
    optimizer_tensors,
    save_checkpoint,
)
from diffreward.finetuning.checks import (
    check_data,
    check_gradients,
    check_image_gradient,
    check_options,
    check_preferences,
    check_ratio,
    check_rewards,
    check_run,
    with_options,
)
from diffreward.finetuning.compute import Compute
from diffreward.finetuning.conditions import Conditions, join
from diffreward.finetuning.monitor import Evaluation, Evaluator, Watch, group_statistics
from diffreward.finetuning.options import Training
from diffreward.finetuning.record import (
    Card,
    Record,
    comparison,
    push_to_hub,
    read_metrics,
)
from diffreward.finetuning.sharding import Lockstep, whole
from diffreward.finetuning.team import Team
from diffreward.finetuning.trainable import Trainable
from diffreward.policy import Condition, Policy, path_log_prob, rollout, sample_generators
from diffreward.preferences import Preferences, read_preferences
from diffreward.rewards import (
    Reward,
    Scores,
    SetReward,
    SetScores,
    evaluate,
    make_reward,
    score_set,
    set_features,
)
from diffreward.rewards.combine import distinct

# streams of `sample_generators`: one per iteration for rollouts, and for other uses beside it
_STREAMS = 1024


@dataclass
class Rollout:
    """The samples of one iteration. Matrices have the rows of all processes; the rest, one's own.

    Attributes:
        prompts: b prompts.
        groups: ``(b,)``; one number per prompt.
        rows: ``(n,)`` which rows are this process's, ascending.
        condition: n conditions.
        latents: x[0], ..., x[T], or x[T] alone, of n samples.
        scores: what the reward gave, ``(b,)`` float64.
        credit: what the algorithm makes of it.
        log_prob: ``(b, T)`` float64, of the policy that drew the samples, T the steps that are
            learnt from; None if not needed.
        log_prob_ref: the same of the pretrained policy.
    """

    prompts: list[str]
    groups: Int[Tensor, " b"]
    rows: Int[Tensor, " n"]
    condition: Condition
    latents: list[Tensor]
    scores: Scores
    credit: Scores | None = None
    log_prob: Float[Tensor, "b T"] | None = None
    log_prob_ref: Float[Tensor, "b T"] | None = None


@dataclass
class FinetuneResult:
    """What a run gives back.

    Attributes:
        policy: the one that came, trained. With an EMA it has the last weights; ``final/`` and the
            evaluations have the averaged ones.
        before, after: evaluations on the same prompts and noise.
        metrics: a row per iteration.
        warnings: of the guard, with the iteration.
        iterations: done.
        stopped: None, "signal" or "guard".
        folder: of the run's files.
    """

    policy: Policy
    before: Evaluation
    after: Evaluation
    metrics: list[dict[str, Any]]
    warnings: list[tuple[int, str]]
    iterations: int
    stopped: str | None = None
    folder: Path | None = None

    def summary(self) -> str:
        """Before and after, as a table."""
        return comparison(self.before, self.after)


class Interrupted(Exception):
    """A signal asked the run to stop."""


def finetune(
    policy: Policy,
    reward: Reward | SetReward | Callable | str | Mapping,
    algorithm: str | Mapping | Algorithm = "prdp",
    prompts: Sequence[str] = ("",),
    *,
    preferences: str | Path | Preferences | None = None,
    data: str | Path | ControlledImages | None = None,
    judges: Sequence[Any] = (),
    eval_prompts: Sequence[str] | None = None,
    eval_data: str | Path | ControlledImages | None = None,
    training: Training | None = None,
    output: str | Path | None = None,
    resume: str | Path | int | None = None,
    config: Mapping[str, Any] | None = None,
    push_to_hub: str | None = None,
    progress: bool = True,
    **options: Any,
) -> FinetuneResult:
    """Finetune a policy towards a reward.

    Args:
        policy: a `Policy` with the network to train as ``policy.denoiser``.
        reward: what `make_reward` takes.
        algorithm: what `make_algorithm` takes.
        prompts: to train on; empty strings for an unconditional model.
        preferences: a data set to learn from in place of own samples, see `diffreward.preferences`,
            for "dpo" and "kto". Prompts are its own, a prompt's samples are its pair (or single
            sample), and the reward only reports; the "reward" of an iteration is the mean label.
        data: captioned pictures in place of prompts: what
            `diffreward.controlled.read_controlled` gives, or, if control images come with them,
            its source. Captions and control images are what is conditioned on, and "ctrl_u" learns
            from the pictures.
        judges: held-out rewards, which only report.
        eval_prompts: to evaluate on; None: the first ``prompts_per_update`` of ``prompts``.
        eval_data: the same with ``data``.
        training: the options; None: their defaults, with all prompts in an update if they are few.
        output: folder for checkpoints, logs and results; None: nothing is written.
        resume: "latest", or a checkpoint of ``output``, by number or path: go on from there.
        config: how policy, reward and prompts were made, for ``config.yaml``; its entries "model",
            "reward" and "judges" are compared when a run is resumed.
        push_to_hub: repository (owner/name) that gets the results.
        progress: show a progress bar.
        **options: single options of `Training`.

    Raises:
        ValueError: bad options, before anything is computed; a reward that is not finite; a
            checkpoint of another run.
        RuntimeError: a self-check of the first update failed.
    """
    if preferences is not None:
        if list(prompts) != [""]:
            raise ValueError("prompts come with the preferences; give one of the two")
        if not isinstance(preferences, Preferences):
            preferences = read_preferences(preferences, getattr(policy, "modality", "image"))
        prompts, size = preferences.prompts_and_size()
        options["samples_per_prompt"] = size
    if data is not None:
        if list(prompts) != [""] or preferences is not None:
            raise ValueError(
                "prompts come with the data; give only one of prompts, preferences and data"
            )
        data = read_controlled(data) if isinstance(data, str | Path) else data
        prompts = data.prompts
    if isinstance(eval_data, str | Path):
        eval_data = read_controlled(eval_data)
    if training is None:
        few = {"prompts_per_update": min(Training().prompts_per_update, max(1, len(prompts)))}
        options = {**few, **options}
    training = with_options(training or Training(), options)
    algorithm = make_algorithm(algorithm)
    reward = make_reward(reward)
    engine = Engine(
        policy, reward, algorithm, list(prompts), training,
        preferences=preferences, data=data, judges=[make_reward(judge) for judge in judges],
        eval_prompts=eval_prompts, eval_data=eval_data, output=output, resume=resume,
        config=config, hub=push_to_hub, progress=progress,
    )  # fmt: skip
    return engine.run()


class Engine:
    """The state of a run, and its loop; `finetune` says what the arguments are."""

    def __init__(
        self,
        policy: Policy,
        reward: Reward | SetReward,
        algorithm: Algorithm,
        prompts: list[str],
        training: Training,
        *,
        preferences: Preferences | None = None,
        data: ControlledImages | None = None,
        judges: Sequence[Reward | SetReward] = (),
        eval_prompts: Sequence[str] | None = None,
        eval_data: ControlledImages | None = None,
        output: str | Path | None = None,
        resume: str | Path | int | None = None,
        config: Mapping[str, Any] | None = None,
        hub: str | None = None,
        progress: bool = True,
    ) -> None:
        self.policy, self.reward = policy, reward
        self.of_sets = isinstance(reward, SetReward)
        self.given = self.algorithm = algorithm  # the latter as it is at this iteration
        self.training, self.prompts = training, prompts
        check_options(training)
        algorithm.check(reward)
        self.preferences = preferences
        if preferences is not None:
            check_preferences(preferences, algorithm)
            if not hasattr(policy, "encode_samples"):
                raise ValueError(
                    f"preferences are learnt from as latents, and {type(policy).__name__} has no "
                    "encode_samples, which would give those of a sample"
                )
        check_data(data, algorithm, policy)  # check_run asks again for what needs no policy
        if eval_data is not None and eval_prompts is not None:
            raise ValueError(
                "prompts to evaluate on come with eval_data; give eval_prompts or eval_data"
            )
        if hasattr(policy, "height"):
            size = policy.height, policy.width
            data = data and data.resized(*size)
            eval_data = eval_data and eval_data.resized(*size)
        self.data = data
        if algorithm.family == "pathwise" and self.of_sets:
            raise ValueError(
                f"{type(algorithm).__name__} differentiates the reward of each sample, and "
                f"{reward.info.name!r} is of whole sets; use dragon, prdp or grpo"
            )
        if algorithm.family == "trajectory" and not getattr(policy, "stochastic", True):
            raise ValueError(
                f"{type(algorithm).__name__} needs the log-probabilities of random steps, and this "
                "policy is deterministic; load it with eta > 0 (ddim), or a stochastic kernel "
                "(ddpm, flow_sde, flow_renoise)"
            )
        self.team = Team(policy.device, training.shard)
        self.batches, start = check_run(
            algorithm, training, len(prompts), self.team.size, output=output, resume=resume,
            hub=hub, data=data,
        )  # fmt: skip
        self.hub = hub

        self.trainable = Trainable(policy, training, self.team)
        self.parameters = list(self.trainable.parameters.values())
        self.optimizer = torch.optim.AdamW(
            self.parameters, lr=training.learning_rate, betas=tuple(training.betas),
            weight_decay=training.weight_decay,
        )  # fmt: skip
        self.compute = Compute(policy.denoiser, self.trainable.reference.denoiser)
        self.steps = max(1, round(training.step_fraction * policy.num_steps))
        self.history = History(max(64, getattr(algorithm, "buffer_size", 0)))
        self.iteration, self.updates, self._evaluated = 0, 0, 0
        self.metrics: list[dict[str, Any]] = []

        if eval_data is None and data is not None and eval_prompts is None:
            eval_data = data.take(range(min(len(data), training.prompts_per_update)))
        if eval_data is not None:
            eval_prompts = eval_data.prompts
        elif eval_prompts is None:
            eval_prompts = prompts[: training.prompts_per_update]
        rewards: dict[str, Reward] = {}
        for found in (reward, *judges):
            rewards[distinct(found.info.name, rewards)] = found
        shown = None
        if eval_data is not None:
            size = training.max_batch or self.batches.per_update
            shown = Conditions(policy, eval_prompts, size, eval_data)
            shown = shown.take(range(len(eval_prompts)))
        self.evaluator = Evaluator(
            policy, self.trainable.reference, rewards, eval_prompts, training.eval_samples,
            training.seed, max_batch=training.max_batch, decode_batch=training.decode_batch,
            team=self.team, condition=shown,
        )  # fmt: skip
        self.conditions = Conditions(
            policy, prompts, training.max_batch or self.batches.per_update, data
        )
        config = dict(config or {})
        self.settings = plain(
            {name: config[name] for name in ("model", "reward", "judges") if name in config}
            | describe(policy, reward, algorithm, training, prompts, eval_prompts)
            | ({"preferences": digest(preferences)} if preferences is not None else {})
            | ({"data": data.about} if data is not None else {})
        )
        self.start = None if start is None else load_checkpoint(start)
        if self.start is not None:  # before anything in its folder is touched
            check_same(self.start[1]["settings"], self.settings, MAY_DIFFER)
        self.folder = None if output is None else Path(output)
        self.record = Record(
            self.folder, yaml.safe_dump(plain(config or self.settings), sort_keys=False),
            environment(policy.device, seed=training.seed, processes=self.team.size),
            training.loggers, team=self.team, iterations=training.iterations, progress=progress,
        )  # fmt: skip

    # -- the loop -----------------------------------------------------------------------------

    def run(self) -> FinetuneResult:
        """Train until the iterations are done, the guard stops, or a signal comes."""
        with _signals() as asked, ExitStack() as stack:
            for part in (self.record, self.compute, self.conditions):
                stack.enter_context(closing(part))
            self.record.say(str(self.batches))
            if self.algorithm.family == "pathwise":
                samples = self.conditions.examples(2)
                if samples is not None and samples.modality == "image":
                    check_image_gradient(self.reward, samples)
            if self.start is None:
                before = self.evaluator(0)
                self.watch = Watch(self.training.guard, before)
                self.record.evaluation(before)
            else:
                before = self._resume(*self.start)
                self.start = None
            first, after, stopped = self.iteration, before, None
            while self.iteration < self.training.iterations and stopped is None:
                try:
                    row = self._iterate(asked)
                except Interrupted:  # nothing has changed since the last iteration
                    stopped = "signal"
                    break
                self.iteration += 1
                self.metrics.append(row)
                self.record.iteration(self.iteration, row)
                if self._due(self.training.evaluate_every):
                    after = self._evaluate()
                if self._due(self.training.checkpoint_every):
                    self._save()
                if self.watch.stop:
                    stopped = "guard"
                if self.team.any(asked()):
                    stopped = "signal"
            done = self.iteration > first or stopped == "signal"
            if done and not (self.iteration and self._due(self.training.checkpoint_every)):
                self._save()
            if stopped != "signal":
                if after.iteration < self.iteration:
                    after = self._evaluate()
                self._finish(stopped)
        return FinetuneResult(
            self.policy, before, after, self.metrics, self.watch.state.warnings, self.iteration,
            stopped, self.folder,
        )  # fmt: skip

    def _due(self, every: int) -> bool:
        return every > 0 and self.iteration % every == 0

    def _finish(self, stopped: str | None) -> None:
        """The results, the numbers first."""
        if self.folder is None or not (self.team.is_main or self.team.shard):
            return
        self.trainable.save(self.folder / "final")
        if not self.team.is_main:
            return
        given, controller = self.settings.get("model", {}), None
        model = given.get("spec") or self.settings["policy"]["type"]
        if hasattr(self.policy, "controller"):
            kind = self.policy.kind
            controller = kind, given.get(kind) or "...", self.policy.trained
        self.record.finish(
            Card(
                model=model,
                algorithm=type(self.given).__name__,
                reward=self.reward.info.name,
                iterations=self.iteration,
                method=self.training.method,
                prompts=f"{len(self.prompts)} prompts",
                options=asdict(self.given) | _training_options(self.training),
                note="The guard stopped the run." if stopped else "",
                controller=controller,
            )
        )
        if self.hub is not None:
            self.record.say(f"pushed to {push_to_hub(self.folder, self.hub)}")

    def _iterate(self, asked: Callable[[], bool]) -> dict[str, Any]:
        """One rollout and its updates."""
        started, cost = time.monotonic(), self.compute.counts()
        found: list[dict[str, float]] = []
        self.algorithm = self.given.at(self.iteration / self.training.iterations)
        if self.algorithm.family == "pathwise":
            scores, groups = self._pathwise(found)
        else:
            ro = self._rollout(asked) if self.preferences is None else self._recorded()
            scores, groups = ro.scores, ro.groups
            for pass_ in range(self.algorithm.passes):
                for m in range(self.algorithm.minibatches):
                    if self.algorithm.family == "trajectory":
                        found.append(self._trajectory(ro, m, fresh=not found))
                    else:
                        found.append(self._denoising(ro, m, pass_))
        row = {
            "updates": self.updates,
            "reward": scores.total if self.of_sets else scores.value.mean().item(),
            "reward_std": scores.value.std(correction=0).item(),
            "flat_groups": group_statistics(scores.value, groups).flat,
        }
        for name in dict.fromkeys(name for numbers in found for name in numbers):
            values = [numbers[name] for numbers in found if name in numbers]
            row[name] = max(values) if name.endswith("_max") else sum(values) / len(values)
        forward, backward = (b - a for a, b in zip(cost, self.compute.counts(), strict=True))
        seconds = time.monotonic() - started
        row |= {"learning_rate": self._rate(self.updates - 1), "forward_rows": forward}
        row |= {"backward_rows": backward, "seconds": seconds}
        row["samples_per_second"] = len(scores) / seconds
        return row

    def _evaluate(self) -> Evaluation:
        with self.trainable.averaged():
            found = self.evaluator(self.iteration)
        flat = [row["flat_groups"] for row in self.metrics[self._evaluated :]]
        self._evaluated = len(self.metrics)
        self.record.evaluation(found, self.watch.check(found, sum(flat) / max(1, len(flat))))
        return found

    def _autocast(self):
        enabled = self.training.mixed_precision == "bf16"
        return torch.autocast(
            self.policy.device.type, torch.bfloat16, enabled=enabled,
            cache_enabled=not self.team.shard,  # it would keep what is to go after each block
        )  # fmt: skip

    # -- collect ------------------------------------------------------------------------------

    @torch.no_grad()
    def _rollout(self, asked: Callable[[], bool]) -> Rollout:
        algorithm, b = self.algorithm, self.training.samples_per_prompt
        chosen = self._choose()
        update = torch.arange(self.batches.total).split(self.batches.per_update)
        own = self.team.rows(self.batches.per_update)
        rows = torch.cat([u[own.start : own.stop] for u in update])
        trajectory = algorithm.family == "trajectory"

        def interrupt(steps):
            for i in steps:
                if self.team.any(asked()):  # a signal reaches each process at another moment
                    raise Interrupted
                yield i

        parts, scores = [], []
        for some in rows.split(self.training.max_batch or len(rows)):
            which = [chosen[r // b] for r in some.tolist()]
            condition = self.conditions.take(which)
            generators = self._generators(some, chosen)
            x = None
            if algorithm.shared_noise:  # the noise of the group's first sample
                first = self._generators(some - some % b, chosen)
                x = self.policy.initial(condition, first)
                self.policy.initial(condition, generators)  # their own is drawn and not used
            with self._autocast():
                part = rollout(
                    self.policy, condition, generators, x=x, keep_path=trajectory,
                    log_prob=trajectory, progress=interrupt,
                )  # fmt: skip
                scores.append(self._score(part.final, condition))
                reference = None
                if trajectory and algorithm.needs_reference:
                    reference = path_log_prob(self.trainable.reference, part, self.steps)
            parts.append((part, reference))
        paths = [part.latents for part, _ in parts]
        ro = Rollout(
            prompts=[self.prompts[chosen[r // b]] for r in range(self.batches.total)],
            groups=torch.arange(self.batches.total) // b,
            rows=rows,
            condition=join([part.condition for part, _ in parts]),
            latents=[torch.cat(x) for x in zip(*paths, strict=True)],
            scores=self._whole_set(rows, scores) if self.of_sets
            else self._whole(rows, Scores.cat(scores)),
        )  # fmt: skip
        if trajectory:
            log_probs = torch.cat([part.log_probs for part, _ in parts])
            ro.log_prob = self._all(rows, log_probs[:, : self.steps])
            if algorithm.needs_reference:
                ro.log_prob_ref = self._all(rows, torch.cat([ref for _, ref in parts]))
        check_rewards(ro.scores, first=self.updates == 0)
        ro.credit = algorithm.credit(ro.scores, ro.groups, ro.prompts, self.history)
        self.history.add(ro.prompts, ro.scores.value)
        return ro

    @torch.no_grad()
    def _recorded(self) -> Rollout:
        """Samples of the data set, in the place of own ones; their labels, in that of credit."""
        chosen, b = self._choose(), self.training.samples_per_prompt
        update = torch.arange(self.batches.total).split(self.batches.per_update)
        own = self.team.rows(self.batches.per_update)
        rows = torch.cat([u[own.start : own.stop] for u in update])
        members = torch.tensor(self.preferences.members(chosen))
        size = getattr(self.policy, "height", None), getattr(self.policy, "width", None)
        latents = []
        for some in rows.split(self.training.max_batch or len(rows)):
            samples = self.preferences.load(members[some].tolist(), None if None in size else size)
            latents.append(self.policy.encode_samples(samples))
        labels = Scores(self.preferences.label[members])
        return Rollout(
            prompts=[self.prompts[chosen[r // b]] for r in range(self.batches.total)],
            groups=torch.arange(self.batches.total) // b,
            rows=rows,
            condition=self.conditions.take([chosen[r // b] for r in rows.tolist()]),
            latents=[torch.cat(latents)],
            scores=labels,
            credit=labels,
        )

    def _choose(self) -> list[int]:
        """Prompts of this iteration: the list is shuffled anew each time it has been gone through.

        What is left of it when it no longer fills a rollout is left out until then, so that no
        prompt comes twice in a rollout.
        """
        n = self.batches.prompts * self.batches.updates
        whole = len(self.prompts) // n
        epoch, at = divmod(self.iteration, whole)
        order = np.random.default_rng([self.training.seed, epoch]).permutation(len(self.prompts))
        return order[at * n : (at + 1) * n].tolist()

    def _generators(self, rows: Tensor, chosen: list[int], use: int = 0) -> list[torch.Generator]:
        """One per row, for one of `_STREAMS` uses in this iteration."""
        b = self.training.samples_per_prompt
        stream = self.iteration * _STREAMS + use
        made = {
            p: sample_generators(self.training.seed, 1, b, first_prompt=p, stream=stream)
            for p in {chosen[r // b] for r in rows.tolist()}
        }
        found = [made[chosen[r // b]][r % b] for r in rows.tolist()]
        if len({id(g) for g in found}) < len(found):  # rows that share one need copies
            found = [_copy(g) for g in found]
        return found

    def _score(self, x0: Tensor, condition: Condition) -> Scores | Tensor:
        """Scores, or features if the reward is of sets."""
        size = self.training.decode_batch or len(x0)
        found = []
        for some in torch.arange(len(x0)).split(size):
            samples = self.policy.decode(x0[some.to(x0.device)], condition.take(some))
            found.append((set_features if self.of_sets else evaluate)(self.reward, samples))
        return torch.cat(found) if self.of_sets else Scores.cat(found)

    def _all(self, rows: Tensor, values: Tensor) -> Tensor:
        """The rows of all processes, in order, float64 on the CPU."""
        order = torch.cat(self.team.gather(rows)).argsort()
        return torch.cat(self.team.gather(values.double()))[order]

    def _whole(self, rows: Tensor, scores: Scores) -> Scores:
        return Scores(
            self._all(rows, scores.value),
            None if scores.std is None else self._all(rows, scores.std),
            {name: self._all(rows, part) for name, part in scores.parts.items()},
        )

    def _whole_set(self, rows: Tensor, features: list[Tensor]) -> SetScores:
        """A rollout, of all processes, is one set."""
        return score_set(self.reward, self._all(rows, torch.cat(features).cpu()))

    # -- update -------------------------------------------------------------------------------

    def _trajectory(self, ro: Rollout, m: int, fresh: bool) -> dict[str, float]:
        """One update; ``fresh``: the first since the rollout, of which all is known."""
        algorithm = self.algorithm
        update, at = self._minibatch(ro, m)
        groups, credit = ro.groups[update], ro.credit.take(update)
        old = ro.log_prob[update]
        ref = None if ro.log_prob_ref is None else ro.log_prob_ref[update]
        with torch.no_grad():
            if fresh and not algorithm.needs_kl:
                log_prob, kl = old.clone(), None
            else:
                log_prob, kl = self._matrices(ro, at)
        log_prob.requires_grad_()
        if kl is not None:
            kl.requires_grad_()
        loss = algorithm.loss(log_prob, old, ref, credit, groups, kl)
        loss.backward()
        empty = torch.zeros_like(log_prob)
        own = torch.isin(update, ro.rows[at])
        weights = [empty if v is None or v.grad is None else v.grad for v in (log_prob, kl)]
        checking = self.updates == 0 and bool(weights[0].any())
        recomputed = self._backward(ro, at, *(w[own] for w in weights), check=checking)
        if checking:
            half = getattr(self.policy, "dtype", torch.float32) in (torch.bfloat16, torch.float16)
            half = half or self.training.mixed_precision != "no"
            gap = check_ratio(recomputed, old[own], half)
            self.record.say(f"self-check: on-policy log-probabilities agree within {gap:.1e} nats")
        numbers = {"loss": loss.item(), **self._step()}
        detached = log_prob.detach()
        if kl is not None:
            numbers["kl"] = kl.detach().sum(1).mean().item()
        elif ref is not None:  # an estimate, exact in expectation just after the rollout
            numbers["kl"] = (detached - ref).sum(1).mean().item()
        return numbers | algorithm.diagnostics(detached, old, ref, credit, groups)

    def _minibatch(self, ro: Rollout, m: int) -> tuple[Tensor, Tensor]:
        """Rows of update m among all, and where this process's are among its own."""
        size = self.batches.per_update
        update = torch.arange(m * size, (m + 1) * size)
        return update, torch.isin(ro.rows, update).nonzero().squeeze(1)

    def _matrices(self, ro: Rollout, at: Tensor) -> tuple[Tensor, Tensor | None]:
        """Log-probabilities and, if needed, KL to the reference, ``(b, T)`` of one update."""
        found = []
        for some in at.split(self.training.max_batch or len(at)):
            condition = ro.condition.take(some)
            columns = []
            for i in range(self.steps):
                x, law = self._law(self.policy, ro, some, condition, i)
                kl = torch.zeros(len(some))
                if self.algorithm.needs_kl:
                    kl = law.kl(self._law(self.trainable.reference, ro, some, condition, i)[1])
                columns.append(torch.stack([law.log_prob(x).double().cpu(), kl.double().cpu()]))
            found.append(torch.stack(columns, -1))
        log_prob, kl = self._all(ro.rows[at], torch.cat(found, 1).transpose(0, 1)).unbind(1)
        return log_prob.contiguous(), kl.contiguous() if self.algorithm.needs_kl else None

    def _law(self, policy: Policy, ro: Rollout, some: Tensor, condition: Condition, i: int):
        """x[i + 1] and the law it came from."""
        rows = some.to(ro.latents[i].device)
        with self._autocast():
            return ro.latents[i + 1][rows], policy.step_law(ro.latents[i][rows], i, condition)

    def _backward(
        self, ro: Rollout, at: Tensor, by_log_prob: Tensor, by_kl: Tensor, check: bool
    ) -> Tensor | None:
        """Gradients of the matrices' entries, weighted; one step's activations at a time.

        Entries of weight 0 are not computed, unless other processes need it. With ``check``, the
        log-probabilities met are given back, NaN for the others.
        """
        met = torch.full_like(by_log_prob, torch.nan) if check else None
        needed = (by_log_prob != 0) | (by_kl != 0)
        always = self.team.shard and self.algorithm.needs_kl
        for i in range(self.steps):
            for some in self._pieces(needed[:, i]):
                condition = ro.condition.take(at[some])
                x, law = self._law(self.policy, ro, at[some], condition, i)
                log_prob = law.log_prob(x)
                total = (by_log_prob[some, i].to(log_prob) * log_prob).sum()
                if always or by_kl[some, i].any():
                    with torch.no_grad():
                        reference = self._law(self.trainable.reference, ro, at[some], condition, i)
                    kl = law.kl(reference[1])
                    total = total + (by_kl[some, i].to(kl) * kl).sum()
                total.backward()
                if check:
                    met[some, i] = log_prob.detach().double().cpu()
        return met

    def _pieces(self, needed: Tensor) -> list[Tensor]:
        """The rows of each network call, of those that are needed.

        If the network is shared out, there are as many calls on each process: other rows fill up.
        """
        rows = needed.nonzero().squeeze(1)
        if self.team.shard:
            more = max(self.team.gather(len(rows))) - len(rows)
            rows = torch.cat([rows, (~needed).nonzero().squeeze(1)[:more]])
        return [some for some in rows.split(self.training.max_batch or len(needed)) if len(some)]

    def _denoising(self, ro: Rollout, m: int, pass_: int) -> dict[str, float]:
        algorithm = self.algorithm
        update, at = self._minibatch(ro, m)
        rows, x0 = ro.rows[at], ro.latents[-1]
        chosen = self._choose()
        draws = range(algorithm.num_draws)

        def errors(policy: Policy, some: Tensor, draw: int) -> Tensor:
            use = 1 + pass_ * algorithm.num_draws + draw
            drawn = rows[some]
            if algorithm.shared_draws:  # those of the group's first sample
                drawn = drawn - drawn % self.training.samples_per_prompt
            generators = self._generators(drawn, chosen, use)
            where = at[some]
            with self._autocast():
                return policy.denoising_loss(
                    x0[where.to(x0.device)], ro.condition.take(where), generators
                )

        def matrix(policy: Policy) -> Tensor:
            pieces = torch.arange(len(at)).split(self.training.max_batch or len(at))
            found = [torch.stack([errors(policy, some, s) for s in draws], 1) for some in pieces]
            return self._all(rows, torch.cat(found))

        with torch.no_grad():
            error = matrix(self.policy)
            reference = matrix(self.trainable.reference) if algorithm.needs_reference else None
        error.requires_grad_()
        credit, groups = ro.credit.take(update), ro.groups[update]
        loss = algorithm.loss(error, reference, credit, groups)
        loss.backward()
        weights = error.grad[torch.isin(update, rows)]
        for s in draws:
            for some in self._pieces(weights[:, s] != 0):
                e = errors(self.policy, some, s)
                (weights[some, s].to(e) * e).sum().backward()
        numbers = algorithm.diagnostics(error.detach(), reference, credit, groups)
        return {"loss": loss.item(), **self._step(), **numbers}

    def _pathwise(self, found: list[dict[str, float]]) -> tuple[Scores, Tensor]:
        b, total = self.training.samples_per_prompt, self.batches.per_update
        chosen, own = self._choose(), self.team.rows(total)
        rows = torch.arange(own.start, own.stop)
        losses, scores = [], []
        for some in rows.split(self.training.max_batch or len(rows)):
            condition = self.conditions.take([chosen[r // b] for r in some.tolist()])
            policies, lockstep = [self.policy, self.trainable.reference], None
            if self.team.shard:
                again = getattr(self.algorithm, "checkpoint", False)
                lockstep = Lockstep(self.team, policies, condition, again)
                policies = lockstep.policies
            extra = {"reference": policies[1]} if self.algorithm.needs_reference else {}
            if self.algorithm.needs_data:
                x0 = self.conditions.latents([chosen[r // b] for r in some.tolist()])
                extra |= {"x0": x0, "reward": self.reward}
            with self._autocast():
                loss, _, score = self.algorithm.loss(
                    policies[0], condition, self._generators(some, chosen),
                    lambda samples: evaluate(self.reward, samples), **extra,
                )  # fmt: skip
                rest = lockstep.finish() if lockstep else 0.0
            (loss.sum() / total + rest).backward()
            losses.append(loss.detach())
            names = self.algorithm.logged
            logged = {name: score.parts[name] for name in names if name in score.parts}
            scores.append(Scores(score.value.detach(), None, logged))
        whole = self._whole(rows, Scores.cat(scores))
        scored = (~whole.value.isnan()).nonzero()[:, 0]
        check_rewards(whole.take(scored), first=self.updates == 0)
        loss = self._all(rows, torch.cat(losses)).mean().item()
        parts = {name: part.nanmean().item() for name, part in whole.parts.items()}
        found.append({"loss": loss, **parts, **self._step()})
        return whole.take(scored), scored // b

    def _step(self) -> dict[str, float]:
        """Sum the gradients over the processes, clip them, and step."""
        if self.updates == 0:
            check_gradients(self.policy.denoiser, self.parameters, self.team)
        for p in self.parameters:
            if p.grad is None:  # nothing of this update reached it; its momentum still moves it
                p.grad = torch.zeros_like(p)
        self.team.sum_gradients(self.parameters)
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, self.training.max_grad_norm)
        norm = whole({"norm": norm}, keep=True)["norm"]
        if not torch.isfinite(norm):
            raise RuntimeError(
                f"the gradient of update {self.updates + 1} is {norm.item()}, and the weights are "
                "as they were before it; lower the learning rate, or check the reward"
            )
        for group in self.optimizer.param_groups:
            group["lr"] = self._rate(self.updates)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.trainable.ema_step()
        self.updates += 1
        return {"grad_norm": norm.item()}

    def _rate(self, update: int) -> float:
        """The learning rate of an update, counted from 0."""
        training, algorithm = self.training, self.algorithm
        total = training.iterations * algorithm.passes * algorithm.minibatches
        left = max(0.0, 1 - max(0, update - training.warmup) / max(1, total - training.warmup))
        factor = {"constant": 1.0, "linear": left, "cosine": (1 - math.cos(math.pi * left)) / 2}
        rise = min(1.0, (update + 1) / max(training.warmup, 1))
        return training.learning_rate * rise * factor[training.schedule]

    # -- checkpoints --------------------------------------------------------------------------

    def _save(self) -> None:
        if self.folder is None:
            return
        main, names = self.team.is_main, list(self.trainable.parameters)
        tensors = {
            "model": whole(self.trainable.state_dict(), keep=main),
            "optimizer": whole(optimizer_tensors(self.optimizer, names), keep=main),
            "rng": {"torch": torch.get_rng_state()},
        }
        if main:
            state = {
                "iteration": self.iteration,
                "updates": self.updates,
                "history": self.history.state_dict(),
                "watch": self.watch.state_dict(),
                "compute": self.compute.counts(),
                "settings": self.settings,
            }
            save_checkpoint(
                self.folder, self.iteration, tensors, state, self.training.keep_checkpoints
            )
        self.team.wait()

    def _resume(self, tensors: dict[str, dict[str, Tensor]], state: dict[str, Any]) -> Evaluation:
        """Take up the state of a checkpoint; gives back the evaluation before training."""
        self.record.resume(state["iteration"])
        before = self.record.before or self.evaluator(0)  # the adapters still do nothing
        self.watch = Watch(self.training.guard, before)
        self.trainable.load_state_dict(tensors["model"])
        names = list(self.trainable.parameters)
        load_optimizer_tensors(self.optimizer, names, tensors["optimizer"])
        torch.set_rng_state(tensors["rng"]["torch"])
        self.iteration, self.updates = state["iteration"], state["updates"]
        self.history.load_state_dict(state["history"])
        self.watch.load_state_dict(state["watch"])
        self.compute.restore(state["compute"])
        every = self.training.evaluate_every
        self._evaluated = self.iteration // every * every if every else 0
        rows = read_metrics(self.folder / "metrics.jsonl")
        self.metrics = [r for r in rows if "reward" in r and r["iteration"] <= self.iteration]
        self.record.say(f"resumed from checkpoint-{self.iteration}")
        return before


def _training_options(training: Training) -> dict[str, Any]:
    left_out = ("guard", "loggers", "checkpoint_every", "keep_checkpoints", "decode_batch")
    return {name: v for name, v in asdict(training).items() if name not in left_out}


def _copy(generator: torch.Generator) -> torch.Generator:
    twin = torch.Generator(device=generator.device)
    twin.set_state(generator.get_state())
    return twin


@contextmanager
def _signals() -> Iterator[Callable[[], bool]]:
    """Whether SIGTERM or SIGINT came; a second SIGINT interrupts as usual."""
    asked = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield asked.is_set
        return

    def note(number, frame):
        if asked.is_set() and number == signal.SIGINT:
            raise KeyboardInterrupt
        asked.set()

    before = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield asked.is_set
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
