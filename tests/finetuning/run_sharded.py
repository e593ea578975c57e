"""Runs of a tiny network: whole in one process, or shared out over several.

torchrun --nproc-per-node 2 run_sharded.py FOLDER

Each process writes what it found to FOLDER/found-RANK.json; FOLDER/NAME.safetensors are weights.
"""

import io
import json
import os
import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
os.environ["HF_HUB_OFFLINE"] = "1"

import torch

torch.set_num_threads(1)

import numpy as np  # noqa: E402
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel  # noqa: E402
from PIL import Image  # noqa: E402
from safetensors.torch import save_file  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from torch.distributed.tensor import DTensor  # noqa: E402
from torch.utils.checkpoint import checkpoint  # noqa: E402

from diffreward.algorithms import make_algorithm  # noqa: E402
from diffreward.algorithms.base import PathwiseAlgorithm, TrajectoryAlgorithm  # noqa: E402
from diffreward.controlled import ControlledImages  # noqa: E402
from diffreward.finetuning import LoRA, Training  # noqa: E402
from diffreward.finetuning.engine import Engine  # noqa: E402
from diffreward.finetuning.sharding import local, whole  # noqa: E402
from diffreward.finetuning.team import Team  # noqa: E402
from diffreward.finetuning.trainable import Trainable  # noqa: E402
from diffreward.policies import load_policy  # noqa: E402
from diffreward.policies.gaussian import FlowSDE, GaussianPolicy  # noqa: E402
from diffreward.policy import Condition, rollout  # noqa: E402
from diffreward.rewards import make_reward  # noqa: E402
from diffreward.samples import Samples  # noqa: E402

PROMPTS = ["red heart", "blue star"]
EVALUATED = ["a cat", "a dog", "a red cat"]  # not as many for each process
SIZE = 3 * 4 * 4


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(32)
        self.to_q, self.to_v = nn.Linear(32, 32), nn.Linear(32, 32)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.to_v(torch.tanh(self.to_q(self.norm(x))))


class Network(nn.Module):
    """Adapters are in the second and third block alone."""

    recomputed = False

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.out = nn.Linear(SIZE + 2, 32), nn.Linear(32, SIZE)
        self.blocks = nn.ModuleList(Block() for _ in range(3))
        self.scale = nn.Parameter(torch.ones(1, 32))

    def enable_gradient_checkpointing(self) -> None:
        self.recomputed = True

    def forward(self, x: Tensor, t: Tensor, c: Tensor) -> Tensor:
        h = self.embed(torch.cat([x.flatten(1), t[:, None] / 1000, c], 1)) * self.scale
        for block in self.blocks:
            again = self.recomputed and torch.is_grad_enabled()
            h = checkpoint(block, h, use_reentrant=False) if again else block(h)
        return self.out(h).view_as(x)


class Tiny(GaussianPolicy):
    """``kill``: the number of the chain at whose start SIGTERM comes."""

    def __init__(self, kill: int | None = None) -> None:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.denoiser = Network()
        self.kernel = FlowSDE(torch.tensor([1000, 700, 400]), torch.tensor([1.0, 0.7, 0.4, 0.0]))
        self.kill, self.chains = kill, 0

    def latent_shape(self, condition):
        return (3, 4, 4)

    def encode(self, prompts, **inputs):
        return Condition(list(prompts), {"c": torch.tensor([[len(p) / 10] for p in prompts])})

    def initial(self, condition, generator=None):
        self.chains += 1
        if self.chains == self.kill:
            os.kill(os.getpid(), signal.SIGTERM)
        return super().initial(condition, generator)

    def predict(self, x, t, condition):
        return self.denoiser(x, t.to(x.dtype), condition.tensors["c"])

    def decode(self, x0, condition):
        return Samples(torch.sigmoid(x0), "image", list(condition.prompts))

    def encode_samples(self, samples):
        return torch.logit(samples.data, 1e-3)


def red(samples):
    return 10 * (samples.data[:, 0] - samples.data[:, 1]).mean((1, 2))


class OneSample(TrajectoryAlgorithm):
    """Learns from the first sample alone, and so leaves other processes nothing to do."""

    needs_reference = needs_kl = True

    def loss(self, log_prob, log_prob_old, log_prob_ref, scores, groups, kl=None):
        return log_prob[0, 1] + 2 * log_prob[0, 0] + 30 * kl[0].sum() - 5 * kl[0, 1]


class Moody(PathwiseAlgorithm):
    """As many steps with gradient, and calls of the reference, as the samples fancy."""

    def loss(self, policy, condition, generator, score):
        with torch.no_grad():
            x = rollout(policy, condition, generator).final
        value = torch.zeros(len(x))
        for i in range(3 if x.sum() > 0 else 1):
            law = policy.step_law(x, i % 2, condition)
            x = law.mean
            if x.mean() > 0:
                with torch.no_grad():
                    reference = policy.reference().step_law(x.detach(), 0, condition)
                value = value + ((x - reference.x0) ** 2).flatten(1).mean(1)
        samples = policy.decode(x, condition)
        scores = score(samples)
        return value - scores.value, samples, scores


def pictures() -> ControlledImages:
    """Of the prompts, 4 x 4, as the bytes of files."""
    found, rng = [], np.random.default_rng(0)
    for _ in PROMPTS:
        stream = io.BytesIO()
        Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)).save(stream, "PNG")
        found.append(stream.getvalue())
    return ControlledImages(list(PROMPTS), found, None, list(PROMPTS), None)


FULL = {"method": "full", "learning_rate": 1e-3}
# the second prediction is in the loss of some samples alone
CTRL_U = {
    "name": "ctrl_u", "max_time": 0.5, "interval": 0.1, "weigh": False, "penalty": 0.5,
    "penalty_gradient": "both",
}  # fmt: skip
RUNS = {
    "prdp": ({"name": "prdp", "passes": 2, "minibatches": 2}, {"ema_decay": 0.5}),
    "one sample": (OneSample(), {}),
    "one sample, full": (OneSample(), FULL),
    "raft": ("raft", {}),  # learns from the best sample of a group: nothing for the other process
    "draft": ("draft", {"max_batch": 2}),  # recomputes steps
    "alignprop, full": ({"name": "alignprop", "truncation": "uniform", "checkpoint": True}, FULL),
    "refl": ({"name": "refl", "start": 0.0, "margin": None, "weight": 1.0}, {}),
    "moody, full": (Moody(), FULL),
    "ctrl_u": (CTRL_U, {}),
    "ctrl_u, full": (CTRL_U, FULL),
    "controlnet++": ({"name": "ctrl_u", "uncertainty": None, "max_time": 0.5}, FULL),
    "full": (
        "reinforce",
        {**FULL, "ema_decay": 0.5, "max_grad_norm": 0.1, "activation_checkpointing": True},
    ),
    "bf16": ("reinforce", {**FULL, "mixed_precision": "bf16", "learning_rate": 1e-4}),
}

KEPT = ("prdp", "full")  #: of which checkpoints are written


def run(name, folder=None, policy=None, **more):
    """The engine after its run, and what the run gave."""
    algorithm, options = RUNS[name]
    options = {
        "prompts_per_update": 1, "samples_per_prompt": 4, "iterations": 2, "eval_samples": 1,
        "evaluate_every": 0, "checkpoint_every": 1, "loggers": [], "learning_rate": 1e-2,
        "max_batch": 1, "lora": LoRA(rank=2, targets=r"blocks\.[12]\.to_."), **options, **more,
    }  # fmt: skip
    start = options.pop("resume", None)
    algorithm = make_algorithm(algorithm)
    engine = Engine(
        policy or Tiny(), make_reward(red), algorithm, PROMPTS, Training(**options),
        data=pictures() if getattr(algorithm, "needs_data", False) else None,
        eval_prompts=EVALUATED, output=folder, resume=start, progress=False,
    )  # fmt: skip
    # not a copy of the network as it is in the course of training
    engine.policy.reference = lambda: engine.trainable.reference
    return engine, engine.run()


def pipeline() -> DDPMPipeline:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = UNet2DModel(
            sample_size=8, block_out_channels=(4, 4), norm_num_groups=2, layers_per_block=1,
            down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2,
            add_attention=False,
        )  # fmt: skip
    return DDPMPipeline(network.eval(), DDPMScheduler())


def weights(engine) -> dict[str, Tensor]:
    """Trained weights, whole."""
    return whole({n: w.detach() for n, w in engine.trainable.parameters.items()}, keep=True)


def bytes_of(tensors) -> int:
    return sum(local(t).untyped_storage().nbytes() for t in tensors)


def base(network: nn.Module) -> list[Tensor]:
    return [w for name, w in network.named_parameters() if "lora" not in name]


def main(folder: Path) -> None:
    found, rank = {}, int(os.environ["RANK"])
    for name in RUNS:
        where = folder / f"two-{name}" if name in KEPT else None
        engine, result = run(name, where, shard=True)
        network, reference = engine.policy.denoiser, engine.trainable.reference.denoiser
        state = [t for s in engine.optimizer.state.values() for t in s.values() if t.ndim]
        found[name] = {
            "base": bytes_of(base(network)), "reference": bytes_of(base(reference)),
            "state": bytes_of(state), "shared": all(isinstance(w, DTensor) for w in base(network)),
            "reward": [row["reward"] for row in result.metrics],
            "grad_norm": [row["grad_norm"] for row in result.metrics],
            "after": result.after.scores[result.after.trained].tolist(),
        }  # fmt: skip
        state = weights(engine)
        if rank == 0:
            save_file(state, folder / f"{name}.safetensors")

    for name in KEPT:  # FOLDER/go-NAME was begun by one process
        engine, _ = run(name, folder / f"go-{name}", shard=True, iterations=3, resume="latest")
        state = weights(engine)
        if rank == 0:
            save_file(state, folder / f"go-{name}.safetensors")

    # two chains of the evaluation, two of the first rollout
    policy = Tiny(kill=5 if rank == 1 else None)
    _, result = run("full", folder / "stopped", policy, shard=True)
    found["stopped"] = [result.stopped, result.iterations, policy.chains]

    drawing = load_policy(pipeline(), num_steps=2)
    training = Training(method="full", shard=True)
    Trainable(drawing, training, Team(drawing.device, shard=True)).save(folder / "pipeline")

    (folder / f"found-{rank}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
