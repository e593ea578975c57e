"""What finetuning did to the samples: evaluations on fixed prompts and seeds, and the guard.

A reward that is maximised rises, whether or not the samples get better. An `Evaluation` holds what
else there is to know about them: rewards that were not trained on, how different the samples of one
prompt are, plain statistics (probes), and how far the model has moved from the pretrained one. Two
evaluations of one run come from the same noise, so that they are compared pair by pair. A `Watch`
compares each with the one before training, and says what looks like reward hacking.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from diffreward.algorithms.base import group_std
from diffreward.files import write_atomic
from diffreward.finetuning.options import Guard
from diffreward.finetuning.team import Team
from diffreward.policy import Condition, Policy, StepLaw, rollout, sample_generators
from diffreward.rewards import (
    Reward,
    SetReward,
    evaluate,
    judge_prompts,
    probes,
    score_set,
    set_features,
)
from diffreward.samples import Samples

STREAM = 2**32 - 1
"""The stream of `sample_generators` that evaluations draw from; rollouts have their iteration's."""

IMAGE_PROBES = {
    "sharpness": probes.laplacian_variance,
    "contrast": probes.rms_contrast,
    "saturation": probes.hsv_saturation,
    "entropy": probes.luma_entropy,
}

# --------------------------------------------------------------------------------------------
# Statistics of samples
# --------------------------------------------------------------------------------------------


def probe(samples: Samples) -> dict[str, Float[Tensor, " b"]]:
    """Plain statistics of each sample, by name.

    Images: sharpness, contrast, saturation and entropy (`diffreward.rewards.probes`). Tokens: the
    entropy in bits of how often each occurs in the sample; for relaxed tokens, of their mean
    distribution. Anything else: none.
    """
    data = samples.data
    if samples.modality == "image":
        some = [data[rows] for rows in torch.arange(len(data)).split(16)]
        return {
            name: torch.cat([f(images.float()) for images in some]).cpu()
            for name, f in IMAGE_PROBES.items()
        }
    kind = _kind(samples)
    if kind == "tokens":
        counts = F.one_hot(data.long(), int(data.max()) + 1).double().mean(1)
    elif kind == "relaxed tokens":
        counts = data.double().mean(1)
    else:
        return {}
    return {"entropy": (torch.special.entr(counts).sum(1) / math.log(2)).float().cpu()}


def diversity(samples: Samples, k: int) -> Float[Tensor, " P"]:
    """Mean distance between two of the k samples of each prompt; NaN if k is 1.

    Images (and the frames of videos) are compared as 16 x 16 pixels, each the mean of an area, by
    root mean square: 0 for equal pictures, at most 1. This sees composition and colour, not
    texture, asks no network, and has nothing to do with the reward. Tokens: the share of positions
    that differ (normalised Hamming distance). Relaxed tokens: the total variation, averaged over
    the positions. Text: the share of words that only one of the two has (Jaccard distance). Other
    tensors: root mean square of the difference.

    Args:
        samples: ``P * k``, prompt-major.
        k: samples per prompt.
    """
    if k == 1:
        return torch.full((len(samples),), math.nan, dtype=torch.float64)
    if isinstance(samples.data, list):
        words = [set(text.split()) for text in samples.data]
        groups = [words[start : start + k] for start in range(0, len(words), k)]
        distances = torch.tensor(
            [[[_jaccard(a, b) for a in group] for b in group] for group in groups]
        )
    else:
        points, kind = _descriptor(samples), _kind(samples)
        length = samples.data.shape[1:2].numel()
        groups = points.reshape(-1, k, points.shape[1])
        distances = torch.stack([_distances(group, kind, length) for group in groups])
    return distances.double().sum((1, 2)).cpu() / (k * (k - 1))


def _kind(samples: Samples) -> str:
    """Which of the conventions of `diffreward.samples` the data follow."""
    data = samples.data
    if isinstance(data, list):
        return "text"
    if samples.modality in ("image", "video"):
        return "pixels"
    if not data.is_floating_point() and data.ndim == 2:
        return "tokens"
    if data.is_floating_point() and data.ndim == 3 and bool((data >= 0).all()):
        total = data.double().sum(2)
        if torch.allclose(total, torch.ones_like(total), atol=1e-3):
            return "relaxed tokens"
    return "other"


def _descriptor(samples: Samples) -> Float[Tensor, "b d"]:
    data = samples.data
    if _kind(samples) == "pixels":
        frames = data.float().flatten(0, -4)
        height, width = (min(16, side) for side in frames.shape[-2:])
        data = F.adaptive_avg_pool2d(frames, (height, width)).reshape(len(data), -1)
    return data.double().reshape(len(data), -1)


def _distances(points: Tensor, kind: str, length: int) -> Float[Tensor, "k k"]:
    if kind == "tokens":
        return (points[:, None] != points).double().mean(2)
    if kind == "relaxed tokens":
        return torch.cdist(points, points, p=1) / (2 * length)
    exact = "donot_use_mm_for_euclid_dist"  # the other way is wrong for near-equal points
    return torch.cdist(points, points, compute_mode=exact) / math.sqrt(points.shape[1])


def _jaccard(a: set[str], b: set[str]) -> float:
    return 1 - len(a & b) / len(a | b) if a | b else 0.0


@dataclass(frozen=True)
class Groups:
    """How the rewards of a rollout spread within the groups of one prompt.

    Attributes:
        flat: share of the groups of two or more whose rewards are all equal.
        std: mean over the groups of the standard deviation within.
    """

    flat: float
    std: float


def group_statistics(values: Float[Tensor, " b"], groups: Int[Tensor, " b"]) -> Groups:
    """Spread of rewards within groups; groups of one sample, and infinite rewards, say nothing."""
    _, at, count = groups.unique(return_inverse=True, return_counts=True)
    high = values.new_full(count.shape, -math.inf).scatter_reduce(0, at, values, "amax")
    low = values.new_full(count.shape, math.inf).scatter_reduce(0, at, values, "amin")
    several = count > 1
    if not several.any():
        return Groups(0.0, 0.0)
    std = values.new_zeros(count.shape).scatter(0, at, group_std(values, at))[several]
    known = std[std.isfinite()]
    return Groups(
        (high == low)[several].double().mean().item(), known.mean().item() if len(known) else 0.0
    )


@dataclass(frozen=True)
class Change:
    """The mean of paired differences.

    Attributes:
        mean: after - before.
        se: its standard error; NaN for fewer than two pairs.
        count: pairs of which both are known and finite.
    """

    mean: float
    se: float
    count: int

    @property
    def interval(self) -> tuple[float, float]:
        """95% confidence interval of the mean, by Student's t."""
        from scipy.stats import t

        half = t.ppf(0.975, self.count - 1) * self.se if self.count > 1 else math.nan
        return self.mean - half, self.mean + half


def paired(before: Float[Tensor, " n"], after: Float[Tensor, " n"]) -> Change:
    """The change of the mean, from samples of the same prompts and seeds.

    The standard error is that of new seeds for these prompts (a little more than that: differences
    between prompts count as noise); it says nothing about prompts that were not evaluated.
    """
    d = after.double() - before.double()
    d = d[d.isfinite()]
    if not len(d):
        return Change(math.nan, math.nan, 0)
    se = d.std().item() / math.sqrt(len(d)) if len(d) > 1 else math.nan
    return Change(d.mean().item(), se, len(d))


# --------------------------------------------------------------------------------------------
# Evaluations
# --------------------------------------------------------------------------------------------


@dataclass
class Evaluation:
    """Samples of fixed prompts and seeds after some iterations; P prompts, n = P * K samples.

    Attributes:
        iteration: iterations done; 0 before training.
        samples: n, prompt-major, on the CPU.
        prompts: the P prompts.
        scores: label -> ``(n,)``, the trained reward first; NaN where a reward cannot judge. Of a
            reward of sets, the pseudo-values of the n samples as one set: their mean is its value.
        probes: name -> ``(n,)``, see `probe`.
        diversity: ``(P,)``, see `diversity`.
        kl: ``(n,)`` nats: KL(model || pretrained) of the steps, summed along the sampled path; its
            mean estimates the KL of whole trajectories. Steps without noise count nothing; None if
            no step has any, if the law has no closed form, or without a pretrained model.
    """

    iteration: int
    samples: Samples
    prompts: list[str]
    scores: dict[str, Float[Tensor, " n"]]
    probes: dict[str, Float[Tensor, " n"]]
    diversity: Float[Tensor, " P"]
    kl: Float[Tensor, " n"] | None

    @property
    def k(self) -> int:
        """Samples per prompt."""
        return len(self.samples) // len(self.prompts)

    @property
    def trained(self) -> str:
        """Label of the trained reward."""
        return next(iter(self.scores))

    @property
    def held_out(self) -> list[str]:
        """Labels of the others."""
        return list(self.scores)[1:]

    def save(self, path: Path) -> None:
        """As safetensors; pictures in 8 bits, all else as it is.

        Of the context, sampling rates and control images.
        """
        from safetensors.torch import save_file

        tensors = {f"scores/{label}": value for label, value in self.scores.items()}
        tensors |= {f"probes/{name}": value for name, value in self.probes.items()}
        tensors["diversity"] = self.diversity
        if self.kl is not None:
            tensors["kl"] = self.kl
        if "control" in self.samples.context:
            tensors["control"] = self.samples.context["control"]
        about = {
            "iteration": self.iteration,
            "prompts": self.prompts,
            "modality": self.samples.modality,
            "sampling_rate": self.samples.context.get("sampling_rate"),
            "scores": list(self.scores),
            "probes": list(self.probes),
        }
        data = self.samples.data
        if isinstance(data, list):
            about["text"] = data
        elif _kind(self.samples) == "pixels":
            tensors["samples"] = (data * 255).round().clamp(0, 255).to(torch.uint8)
        else:
            tensors["samples"] = data
        tensors = {name: value.contiguous() for name, value in tensors.items()}
        about = {"evaluation": json.dumps(about)}
        write_atomic(path, lambda p: save_file(tensors, p, about))

    @staticmethod
    def load(path: Path) -> Evaluation:
        """What `save` wrote."""
        from safetensors import safe_open

        with safe_open(path, "pt") as file:
            about = json.loads(file.metadata()["evaluation"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}
        data = about["text"] if "text" in about else tensors["samples"]
        if isinstance(data, Tensor) and data.dtype == torch.uint8:
            data = data.float() / 255
        rates = about.get("sampling_rate")
        context = {} if rates is None else {"sampling_rate": [int(rate) for rate in rates]}
        if "control" in tensors:
            context["control"] = tensors["control"]
        prompts, n = about["prompts"], len(data)
        asked = [prompt for prompt in prompts for _ in range(n // len(prompts))]
        return Evaluation(
            about["iteration"],
            Samples(data, about["modality"], asked, context),
            prompts,
            {label: tensors[f"scores/{label}"] for label in about["scores"]},
            {name: tensors[f"probes/{name}"] for name in about["probes"]},
            tensors["diversity"],
            tensors.get("kl"),
        )


class Evaluator:
    """Samples the same prompts from the same noise at every call.

    Neither the size of batches nor the number of processes changes what comes out, beyond the
    rounding of a network that sees other batches. It changes no random state but its own, and
    leaves the network's mode (dropout) to the caller.

    Args:
        policy: the model that is trained.
        reference: the pretrained model, for the KL; None: no KL.
        rewards: label -> reward: the trained one, which must judge all prompts, then the held-out
            ones.
        prompts: P prompts.
        samples_per_prompt: K.
        seed: of the noise.
        max_batch: most samples in one network call; None: all of this process.
        decode_batch: most samples decoded and scored at once; None: ``max_batch``.
        team: the processes, which share the work.
        condition: of the prompts, where they are encoded already.

    Raises:
        ValueError: no reward, prompt or sample is asked for, or the condition is not the prompts'.
    """

    def __init__(
        self,
        policy: Policy,
        reference: Policy | None,
        rewards: dict[str, Reward | SetReward],
        prompts: Sequence[str],
        samples_per_prompt: int = 4,
        seed: int = 0,
        *,
        max_batch: int | None = None,
        decode_batch: int | None = None,
        team: Team,
        condition: Condition | None = None,
    ) -> None:
        if not rewards or not prompts or samples_per_prompt < 1:
            raise ValueError(
                "an evaluation needs a reward, a prompt and a sample per prompt, but there are "
                f"{len(rewards)}, {len(prompts)} and {samples_per_prompt}"
            )
        self.policy, self.reference, self.rewards = policy, reference, dict(rewards)
        self.prompts, self.k, self.seed, self.team = list(prompts), samples_per_prompt, seed, team
        self.max_batch, self.decode_batch = max_batch, decode_batch or max_batch
        with torch.no_grad():
            self.condition = policy.encode(self.prompts) if condition is None else condition
        if len(self.condition) != len(self.prompts):
            raise ValueError(
                f"the condition has {len(self.condition)} rows for {len(self.prompts)} prompts"
            )
        self.can_judge: dict[str, list[bool]] = {}  # found at the first call

    def __call__(self, iteration: int) -> Evaluation:
        """Sample and score, on every process the whole."""
        n, own = len(self.prompts) * self.k, list(self.team.rows(len(self.prompts) * self.k))
        generators = sample_generators(self.seed, len(self.prompts), self.k, stream=STREAM)
        parts = []
        calls, most = (_split(r, self.max_batch) for r in (own, range(-(-n // self.team.size))))
        with torch.no_grad():
            for rows in calls:
                parts += self._sample(rows, [generators[row] for row in rows])
            if self.team.shard and len(calls) < len(most):  # others need this process for theirs
                measured = _Measured(self.policy, self.reference)
                rollout(measured, self.condition.take([0]), generators[:1])
        parts = [part for found in self.team.gather(parts) for part in found]
        samples = Samples.cat([part.samples for part in parts])
        assert len(samples) == n
        nats = [part.kl for part in parts]
        found = {label: torch.cat([part.scores[label] for part in parts]) for label in self.rewards}
        for label, reward in self.rewards.items():
            if isinstance(reward, SetReward):
                found[label] = score_set(reward, found[label]).pseudovalues()
        return Evaluation(
            iteration,
            samples,
            self.prompts,
            found,
            probe(samples),
            diversity(samples, self.k),
            None if any(kl is None for kl in nats) else torch.cat(nats),
        )

    def _sample(self, rows: list[int], generators: list[torch.Generator]) -> list[_Part]:
        condition = self.condition.take([row // self.k for row in rows])
        measured = _Measured(self.policy, self.reference)
        x0 = rollout(measured, condition, generators).final
        parts = []
        for some in _split(list(range(len(rows))), self.decode_batch):
            samples = self.policy.decode(x0[some], condition.take(some)).detach()
            if not self.can_judge:
                self._find_judges(samples.take([0]))
            prompts = [rows[j] // self.k for j in some]
            scores = {label: self._score(label, samples, prompts) for label in self.rewards}
            kl = None if measured.kl is None else measured.kl[some].cpu()
            parts.append(_Part(samples.to("cpu"), scores, kl))
        return parts

    def _score(self, label: str, samples: Samples, prompts: list[int]) -> Float[Tensor, "b ..."]:
        """Scores, or the features of a reward of sets, on the CPU."""
        if isinstance(self.rewards[label], SetReward):
            return set_features(self.rewards[label], samples).cpu()
        value = torch.full((len(samples),), math.nan)
        can = [j for j, p in enumerate(prompts) if self.can_judge[label][p]]
        if can:
            value[can] = evaluate(self.rewards[label], samples.take(can)).value.cpu()
        return value

    def _find_judges(self, like: Samples) -> None:
        can = {}
        for n, (label, reward) in enumerate(self.rewards.items()):
            # where the trained reward cannot judge, its own error shall be seen
            if n == 0 or isinstance(reward, SetReward):
                can[label] = [True] * len(self.prompts)
                continue
            can[label] = []
            for some in _split(self.prompts, self.decode_batch):
                can[label] += judge_prompts(reward, some, like)[0]
        self.can_judge = can


@dataclass
class _Part:
    samples: Samples
    scores: dict[str, Tensor]
    kl: Tensor | None


class _Measured:
    """A policy that adds up, while it is sampled, the KL of its steps to a reference."""

    def __init__(self, policy: Policy, reference: Policy | None) -> None:
        for name in ("num_steps", "device", "encode", "initial", "decode", "denoising_loss"):
            setattr(self, name, getattr(policy, name))
        self.policy, self._reference = policy, reference
        self.kl: Tensor | None = None

    def reference(self) -> Policy:
        return self.policy.reference()

    def step_law(self, x: Tensor, i: int, condition: Condition) -> StepLaw:
        law = self.policy.step_law(x, i, condition)
        if self._reference is not None and not getattr(law, "deterministic", False):
            try:
                nats = law.kl(self._reference.step_law(x, i, condition)).double()
            except NotImplementedError:
                self._reference, self.kl = None, None
            else:
                self.kl = nats if self.kl is None else self.kl + nats
        return law


def _split(rows: Sequence, size: int | None) -> list[list]:
    size = size or max(1, len(rows))
    return [list(rows[start : start + size]) for start in range(0, len(rows), size)]


# --------------------------------------------------------------------------------------------
# The guard
# --------------------------------------------------------------------------------------------


@dataclass
class GuardState:
    """What a `Watch` remembers.

    Attributes:
        last: kinds of warning that the last evaluation gave.
        repeated: those of them that the one before gave, too.
        warnings: all that were given, with the iteration.
    """

    last: list[str] = field(default_factory=list)
    repeated: list[str] = field(default_factory=list)
    warnings: list[tuple[int, str]] = field(default_factory=list)


class Watch:
    """Compares evaluations with the one before training and warns of reward hacking.

    Args:
        options: the limits.
        baseline: the evaluation before training.

    Raises:
        ValueError: there is a limit for a KL that cannot be measured.
    """

    def __init__(self, options: Guard, baseline: Evaluation) -> None:
        if options.max_kl is not None and baseline.kl is None:
            raise ValueError(
                "guard.max_kl needs the KL to the pretrained model, which this run cannot "
                "measure: it has no pretrained model beside it, its sampler draws no noise, or "
                "its law has no closed form; leave guard.max_kl null"
            )
        self.options, self.baseline, self.state = options, baseline, GuardState()

    @property
    def stop(self) -> bool:
        """Training should stop: two evaluations in a row gave a warning of one kind."""
        return self.options.stop and bool(self.state.repeated)

    def check(self, evaluation: Evaluation, flat_groups: float) -> list[str]:
        """What is wrong with an evaluation, with the numbers.

        Args:
            evaluation: of the same prompts and seeds as the baseline.
            flat_groups: share of flat groups in the rollouts since the last one; see
                `group_statistics`.
        """
        found = {
            **self._diversity(evaluation),
            **self._flat(flat_groups),
            **self._probes(evaluation),
            **self._kl(evaluation),
            **self._held_out(evaluation),
        }
        state, kinds = self.state, list(found)
        state.repeated = [kind for kind in kinds if kind in state.last]
        state.last = kinds
        state.warnings += [(evaluation.iteration, text) for text in found.values()]
        return list(found.values())

    def state_dict(self) -> dict[str, Any]:
        """JSON values."""
        return {**asdict(self.state), "warnings": [list(w) for w in self.state.warnings]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        warnings = [(int(iteration), text) for iteration, text in state["warnings"]]
        self.state = GuardState(list(state["last"]), list(state["repeated"]), warnings)

    def _diversity(self, now: Evaluation) -> dict[str, str]:
        was, is_ = (e.diversity.mean().item() for e in (self.baseline, now))
        if not is_ < self.options.min_diversity * was:  # also where there is one sample a prompt
            return {}
        return {
            "diversity": f"the samples of one prompt are {is_ / was:.0%} as far from each other "
            f"as before training ({is_:.3g}, was {was:.3g}; the limit is "
            f"{self.options.min_diversity:.0%}): the model forgets what else it could do"
        }

    def _flat(self, share: float) -> dict[str, str]:
        if not share > self.options.max_flat_groups:
            return {}
        return {
            "flat": f"for {share:.0%} of the prompts all samples got the same reward (the limit "
            f"is {self.options.max_flat_groups:.0%}), and these teach nothing"
        }

    def _probes(self, now: Evaluation) -> dict[str, str]:
        found = {}
        for name, before in self.baseline.probes.items():
            before, after = before.double(), now.probes[name].double()
            was, is_ = before.mean().item(), after.mean().item()
            std = before.std().item() if len(before) > 1 else 0.0
            if std > 0 and abs(is_ - was) > self.options.max_shift * std:
                found[f"probe {name}"] = (
                    f"{name} moved from {was:.3g} to {is_:.3g}, which is "
                    f"{abs(is_ - was) / std:.1f} standard deviations of the samples before "
                    f"training (the limit is {self.options.max_shift:g}): look at the samples"
                )
        return found

    def _kl(self, now: Evaluation) -> dict[str, str]:
        if self.options.max_kl is None or now.kl is None:
            return {}
        nats = now.kl.mean().item()
        if not nats > self.options.max_kl:
            return {}
        return {
            "kl": f"the KL to the pretrained model is {nats:.3g} nats (the limit is "
            f"{self.options.max_kl:g})"
        }

    def _held_out(self, now: Evaluation) -> dict[str, str]:
        rise = paired(self.baseline.scores[now.trained], now.scores[now.trained])
        if not rise.mean > 0:
            return {}
        found = {}
        for label in now.held_out:
            change = paired(self.baseline.scores[label], now.scores[label])
            if change.mean < -self.options.held_out * change.se:
                found[f"held-out {label}"] = (
                    f"{label}, which is not trained on, fell by {-change.mean:.3g} (standard "
                    f"error {change.se:.2g}, {change.count} pairs) while {now.trained} rose by "
                    f"{rise.mean:.3g}: the reward may be being hacked"
                )
        return found
