"""The options of finetuning that belong to no algorithm. This module imports no torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True)
class LoRA:
    """Low-rank adapters

    Args:
        rank: of the adapters.
        alpha: they are scaled by alpha / rank; null: alpha = rank.
        targets: names (or their ends) of the layers that get one, or one regular expression;
            null: the attention projections, or what the policy has instead.
    """

    rank: int = 16
    alpha: float | None = None
    targets: list[str] | str | None = None


@dataclass(frozen=True)
class Guard:
    """When to warn that the reward rises and the samples do not get better

    Args:
        min_diversity: warn when samples of one prompt are, on average, closer to each other than
            this share of what they were.
        max_flat_groups: warn when more than this share of the prompts has samples that all get
            the same reward, which teach nothing.
        max_shift: warn when a probe (sharpness, contrast, saturation, entropy) has moved by more
            than this many standard deviations of the samples before training.
        max_kl: warn when the KL to the pretrained model exceeds this, in nats; null: never.
        held_out: warn when the reward has risen and a held-out one has fallen by more than this
            many standard errors.
        stop: stop training at a warning, after two evaluations that give it.
    """

    min_diversity: float = 0.5
    max_flat_groups: float = 0.5
    max_shift: float = 2.0
    max_kl: float | None = None
    held_out: float = 2.0
    stop: bool = False


@dataclass(frozen=True)
class Training:
    """Training

    Args:
        iterations: rollouts, each followed by the updates of the algorithm.
        prompts_per_update: prompts in one update.
        samples_per_prompt: samples of each prompt, which are compared with each other.
        learning_rate: of AdamW, after the warm-up.
        weight_decay: of AdamW.
        betas: of AdamW.
        warmup: updates over which the learning rate rises from 0.
        schedule: of the learning rate after that: constant, or to 0 at the last update by a line
            or a half cosine.
        max_grad_norm: longer gradients are shortened to this.
        method: lora trains adapters, full the whole network.
        lora: the adapters.
        ema_decay: of an exponential moving average of the weights, which is evaluated and saved
            instead of them; null: none.
        max_batch: most samples in one network call; an update takes as many calls as it needs,
            and comes out the same. null: all at once.
        decode_batch: most samples decoded and scored at once; null: max_batch.
        activation_checkpointing: less memory for a third more time.
        compile: torch.compile the network.
        mixed_precision: bf16 runs a network with float32 weights in bfloat16; no: in the weights'
            own precision. Adapters are float32 in any case.
        shard: share the network out over the processes (FSDP2): each keeps a part of the weights,
            and with method=full of gradients, averages and AdamW's state. No effect on one process.
        checkpoint_every: iterations between checkpoints; 0: only where a run ends.
        keep_checkpoints: older ones are removed.
        evaluate_every: iterations between evaluations; 0: only before and after.
        eval_samples: samples of each prompt of an evaluation.
        loggers: besides metrics.jsonl: tensorboard, wandb, trackio.
        step_fraction: share of the chain's steps that trajectory algorithms learn from, the
            first and noisiest ones; the others are drawn and count as part of the reward. Little
            noise makes the gradient of a log-probability large, and what the last steps draw hardly
            changes the sample: one of them can drown all others.
        guard: when to warn.
        seed: of everything random.
    """

    iterations: int = 100
    prompts_per_update: int = 8
    samples_per_prompt: int = 4
    learning_rate: float = 1e-4
    weight_decay: float = 1e-4
    betas: tuple[float, float] = (0.9, 0.999)
    warmup: int = 0
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    max_grad_norm: float = 1.0
    method: Literal["lora", "full"] = "lora"
    lora: LoRA = field(default_factory=LoRA)
    ema_decay: float | None = None
    max_batch: int | None = None
    decode_batch: int | None = None
    activation_checkpointing: bool = False
    compile: bool = False
    mixed_precision: Literal["no", "bf16"] = "no"
    shard: bool = False
    checkpoint_every: int = 50
    keep_checkpoints: int = 2
    evaluate_every: int = 25
    eval_samples: int = 4
    loggers: list[Literal["tensorboard", "wandb", "trackio"]] = field(
        default_factory=lambda: ["tensorboard"]
    )
    step_fraction: float = 1.0
    guard: Guard = field(default_factory=Guard)
    seed: int = 0
