"""What one finetuning update costs, as ratios within one run.

    python scripts/bench_finetune.py                        # embedded model, CPU, minutes
    python scripts/bench_finetune.py --tiny                 # seconds: to see that it runs
    python scripts/bench_finetune.py --parts sized --device cuda    # torch, diffusers, peft

``passes``: an update of PRDP on a whole rollout by the engine (two passes, the activations of one
    step) and by a plain implementation of the same loss (one graph of all T steps), for several T:
    seconds, bytes that autograd keeps, and the difference of their gradients. The engine knows the
    log-probabilities of the first update from the rollout; later ones compute them anew: both are
    timed. Nothing is clipped, so that no step is left out. Peak memory is that of a fresh process
    for each.
``pipeline``: rollout, scoring and one update of DDPO by the engine, and as it is done around a
    diffusers pipeline: its own call, with a scheduler that also gives the log-probability, one
    prompt at a time or all at once; then every step again with its gradient. Same network,
    adapters, numbers of images and loss.
``sized``: UNets of the sizes of Stable Diffusion 1.5 and XL with random weights, LoRA, bfloat16:
    the most images in one network call (guided, so twice as many rows) for which the gradient of a
    step fits into 24 and 80 GB, and what a step takes. It uses nothing of this package, so that
    this file alone runs on a rented machine: it does what the engine does in a step.

Goal: memory of ``passes`` that does not grow with T. Results belong in docs/benchmarks.md, with
hardware and date.
"""

import argparse
import contextlib
import copy
import gc
import json
import os
import re
import resource
import statistics
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import torch

PROMPTS = [
    "two blue hearts and a red circle",
    "a green star above a black ring",
    "three yellow squares",
    "a purple circle left of an orange triangle",
]
UNCLIPPED = {"name": "prdp", "clip": 1e9}
GB = 10**9


# --------------------------------------------------------------------------------------------
# Clocks and memory
# --------------------------------------------------------------------------------------------


class SavedBytes:
    """Bytes of memory that autograd keeps for the backward pass while this is entered.

    Memory shared by several saved tensors counts once; that of ``parameters`` does not count.

    Attributes:
        peak: the most at any moment.
    """

    def __init__(self, parameters=()) -> None:
        self._not_counted = {p.untyped_storage().data_ptr() for p in parameters}
        self._users: Counter[int] = Counter()
        self.now = self.peak = 0

    def __enter__(self) -> "SavedBytes":
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda s: s.tensor)
        self._hooks.__enter__()
        return self

    def __exit__(self, *error) -> None:
        self._hooks.__exit__(*error)

    def _pack(self, tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() in self._not_counted:
            return _Saved(None, tensor)
        self._change(storage, 1)
        return _Saved(self, tensor.detach())  # detached: it may be an output of what keeps it

    def _change(self, storage, by: int) -> None:
        key = storage.data_ptr()
        had = self._users[key] > 0
        self._users[key] += by
        has = self._users[key] > 0
        self.now += (has - had) * storage.nbytes()
        self.peak = max(self.peak, self.now)


class _Saved:
    def __init__(self, owner: SavedBytes | None, tensor: torch.Tensor) -> None:
        self.owner, self.tensor = owner, tensor

    def __del__(self) -> None:
        if self.owner is not None:
            self.owner._change(self.tensor.untyped_storage(), -1)


def resident_peak() -> int:
    """The most bytes this process has had in memory."""
    status = Path("/proc/self/status")
    if status.exists():  # what getrusage says includes the parent's, if that started this process
        found = re.search(r"VmHWM:\s+(\d+) kB", status.read_text())
        return int(found[1]) * 2**10
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 2**10


def synchronise(device) -> None:
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()


def clock(work, device) -> float:
    synchronise(device)
    started = time.perf_counter()
    work()
    synchronise(device)
    return time.perf_counter() - started


def alternate(arms: dict, repeats: int, device) -> dict[str, list[float]]:
    """Seconds of each, in turn, after a warm-up: a busy machine is busy for all of them."""
    for work in arms.values():
        work()
    seconds = {name: [] for name in arms}
    for _ in range(repeats):
        for name, work in arms.items():
            seconds[name].append(clock(work, device))
    return seconds


def ratio(seconds: dict[str, list[float]], over: str, under: str) -> dict[str, float]:
    found = sorted(a / b for a, b in zip(seconds[over], seconds[under], strict=True))
    numbers = {"min": found[0], "median": statistics.median(found), "max": found[-1]}
    return {name: round(number, 3) for name, number in numbers.items()}


# --------------------------------------------------------------------------------------------
# Two passes against one graph
# --------------------------------------------------------------------------------------------


def make_engine(args, algorithm, num_steps: int):
    """An engine on the embedded model, ready for its first iteration."""
    from diffreward import load_policy, make_reward
    from diffreward.algorithms import make_algorithm
    from diffreward.finetuning.engine import Engine
    from diffreward.finetuning.options import Training

    policy = load_policy(args.model, num_steps=num_steps, device=args.device)
    training = Training(
        prompts_per_update=args.prompts, samples_per_prompt=args.samples, eval_samples=1
    )
    return Engine(
        policy, make_reward(args.reward), make_algorithm(algorithm), PROMPTS[: args.prompts],
        training, progress=False,
    )  # fmt: skip


def collect(engine):
    return engine._rollout(lambda: False)


def engine_gradient(engine, ro, fresh: bool) -> None:
    """The gradient of an update, in two passes; ``fresh``: the first one of a rollout."""
    engine.updates = 1  # the self-checks of the first update are not what it costs
    step, engine._step = engine._step, dict
    try:
        engine._trajectory(ro, 0, fresh=fresh)
    finally:
        engine._step = step


def plain_gradient(engine, ro) -> None:
    """The same from one graph of all steps."""
    from diffreward.policy import Trajectory, path_log_prob

    log_prob = path_log_prob(engine.policy, Trajectory(ro.condition, ro.latents)).double().cpu()
    engine.algorithm.loss(log_prob, ro.log_prob, ro.log_prob_ref, ro.credit, ro.groups).backward()


def moved(engine) -> None:
    """Put the adapters where training has been: with B = 0 half of the gradients are 0."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in engine.parameters:
            p += 1e-3 * torch.randn(p.shape, generator=generator).to(p)


def gradients(engine) -> torch.Tensor:
    found = torch.cat([p.grad.flatten() for p in engine.parameters if p.grad is not None])
    for p in engine.parameters:
        p.grad = None
    return found


def passes_arms(engine, ro) -> dict:
    arms = {
        "two passes, first update": lambda: engine_gradient(engine, ro, fresh=True),
        "two passes, later updates": lambda: engine_gradient(engine, ro, fresh=False),
        "one graph": lambda: plain_gradient(engine, ro),
    }
    return {name: lambda work=work: (work(), gradients(engine)) for name, work in arms.items()}


def saved_bytes(work, engine) -> int:
    with SavedBytes(engine.policy.denoiser.parameters()) as saved:
        work()
    return saved.peak


def passes(args) -> dict:
    found = {}
    for num_steps in args.num_steps:
        engine = make_engine(args, UNCLIPPED, num_steps)
        with contextlib.closing(engine.compute):
            ro = collect(engine)
            moved(engine)
            engine_gradient(engine, ro, fresh=False)
            ours = gradients(engine)
            plain_gradient(engine, ro)
            theirs = gradients(engine)
            arms = passes_arms(engine, ro)
            seconds = alternate(arms, args.repeats, args.device)
            saved = {name: saved_bytes(work, engine) for name, work in arms.items()}
        images = args.prompts * args.samples
        found[f"T = {num_steps}"] = {
            "images": images,
            "relative difference of gradients": float(f"{_gap(ours, theirs):.1e}"),
            "images_per_second": {
                name: round(images / statistics.median(s), 3) for name, s in seconds.items()
            },
            "time of one graph / first update": ratio(
                seconds, "one graph", "two passes, first update"
            ),
            "time of one graph / later updates": ratio(
                seconds, "one graph", "two passes, later updates"
            ),
            "saved_mib": {name: round(n / 2**20, 2) for name, n in saved.items()},
            "saved by one graph / by two passes": round(
                saved["one graph"] / max(saved["two passes, later updates"], 1), 2
            ),
            **({} if args.no_peaks else {"peak_mib": peaks(num_steps)}),
        }
    return found


def _gap(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a - b).norm() / b.norm()).item()


def peaks(num_steps: int) -> dict[str, float]:
    """MiB per arm, each in a process of its own, beside that of the rollout alone."""
    found = {}
    for arm in ("rollout", "two passes, later updates", "one graph"):
        command = [sys.executable, __file__, *sys.argv[1:], "--num_steps", str(num_steps)]
        command += ["--peak_of", arm]
        out = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        found[arm] = round(float(out.strip().splitlines()[-1]), 1)
    return found


def peak_of(args) -> float:
    engine = make_engine(args, UNCLIPPED, args.num_steps[0])
    ro = collect(engine)
    moved(engine)
    if torch.device(args.device).type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    if args.peak_of != "rollout":
        passes_arms(engine, ro)[args.peak_of]()
    if torch.device(args.device).type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    return resident_peak() / 2**20


# --------------------------------------------------------------------------------------------
# The engine against a diffusers pipeline with a scheduler that knows log-probabilities
# --------------------------------------------------------------------------------------------


def log_prob_scheduler(scheduler):
    """A DDIM scheduler that keeps the path and the log-probability of each of its steps."""
    from diffusers import DDIMScheduler

    class LogProbDDIM(DDIMScheduler):
        def start(self) -> None:
            self.path, self.log_probs, self.times = [], [], []

        def law(self, output, t, sample, eta):
            """Mean, by the scheduler's own step without noise, and standard deviation."""
            still = torch.zeros_like(sample)
            mean = super().step(output, t, sample, eta=eta, variance_noise=still).prev_sample
            before = t - self.config.num_train_timesteps // self.num_inference_steps
            return mean, eta * self._get_variance(t, before) ** 0.5

        def log_prob(self, x, mean, std):
            nats = torch.distributions.Normal(mean.float(), std.float()).log_prob(x.float())
            return nats.flatten(1).sum(1)

        def step(self, model_output, timestep, sample, eta=0.0, generator=None, **kwargs):
            mean, std = self.law(model_output, timestep, sample, eta)
            x = mean + std * torch.randn(mean.shape, generator=generator).to(mean)
            self.path.append(sample)
            self.last = x
            self.times.append(timestep)
            self.log_probs.append(self.log_prob(x, mean, std))
            return (x,)

    return LogProbDDIM.from_config(scheduler.config)


def pipeline_rollout(pipe, prompts, k, num_steps, scale, generator=None):
    """Images, latents ``T + 1``, times and log-probabilities ``(b, T)`` of the pipeline's call."""
    pipe.scheduler.start()
    out = pipe(
        prompts, num_images_per_prompt=k, num_inference_steps=num_steps, guidance_scale=scale,
        eta=1.0, generator=generator, output_type="pt",
    )  # fmt: skip
    s = pipe.scheduler
    return out.images, [*s.path, s.last], list(s.times), torch.stack(s.log_probs, 1)


def pipeline_update(pipe, algorithm, prompts, groups, latents, times, old, credit, scale) -> None:
    """The gradient of DDPO's loss, a backward pass per step."""
    device, steps = pipe.unet.device, len(times)
    prompt, negative = pipe.encode_prompt(prompts, device, 1, True)
    embeds = torch.cat([negative, prompt])
    for i, t in enumerate(times):
        output = pipe.unet(
            torch.cat([latents[i]] * 2), t, encoder_hidden_states=embeds, return_dict=False
        )[0]
        without, with_prompt = output.chunk(2)
        output = without + scale * (with_prompt - without)
        mean, std = pipe.scheduler.law(output, t, latents[i], 1.0)
        log_prob = pipe.scheduler.log_prob(latents[i + 1], mean, std)
        loss = algorithm.loss(
            log_prob.double().cpu()[:, None], old[:, i : i + 1].double().cpu(), None, credit, groups
        )
        (loss / steps).backward()


class Around:
    """DDPO around a diffusers pipeline, on the network (and adapters) of an engine."""

    def __init__(self, engine, num_steps: int) -> None:
        self.engine, self.num_steps = engine, num_steps
        self.pipe = copy.copy(engine.policy.pipe)
        self.pipe.scheduler = log_prob_scheduler(engine.policy.pipe.scheduler)
        self.pipe.set_progress_bar_config(disable=True)
        self.pipe.text_encoder.to(engine.policy.device)  # the engine has no more need of it there

    def __call__(self, at_once: bool) -> None:
        from diffreward import Samples, evaluate

        engine, k = self.engine, self.engine.training.samples_per_prompt
        scale, parts = engine.policy.guidance_scale, []
        for some in [engine.prompts] if at_once else [[p] for p in engine.prompts]:
            with torch.no_grad():
                parts.append(pipeline_rollout(self.pipe, some, k, self.num_steps, scale))
        prompts = [p for p in engine.prompts for _ in range(k)]
        groups = torch.arange(len(prompts)) // k
        images = torch.cat([part[0] for part in parts]).float()
        latents = [torch.cat(x) for x in zip(*(part[1] for part in parts), strict=True)]
        old = torch.cat([part[3] for part in parts])
        scores = evaluate(engine.reward, Samples(images, "image", prompts))
        scores = type(scores)(scores.value.double().cpu())
        credit = engine.algorithm.credit(scores, groups, prompts, engine.history)
        pipeline_update(
            self.pipe, engine.algorithm, prompts, groups, latents, parts[0][2], old, credit, scale
        )
        gradients(engine)


def pipeline(args) -> dict:
    num_steps = max(args.num_steps)
    engine = make_engine(args, "ddpo", num_steps)
    around = Around(engine, num_steps)

    def ours() -> None:
        engine_gradient(engine, collect(engine), fresh=True)
        gradients(engine)

    arms = {
        "engine": ours,
        "pipeline, one prompt at a time": lambda: around(False),
        "pipeline, all at once": lambda: around(True),
    }
    with contextlib.closing(engine.compute):
        seconds = alternate(arms, args.repeats, args.device)
    images = args.prompts * args.samples
    return {
        "images": images,
        "num_steps": num_steps,
        "images_per_second": {
            name: round(images / statistics.median(s), 3) for name, s in seconds.items()
        },
        **{
            f"time of {name} / of engine": ratio(seconds, name, "engine")
            for name in arms
            if name != "engine"
        },
    }


# --------------------------------------------------------------------------------------------
# Networks of real sizes
# --------------------------------------------------------------------------------------------

NETWORKS = {
    "sd15": {"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8},
    "sdxl": {
        "sample_size": 128,
        "cross_attention_dim": 2048,
        "attention_head_dim": [5, 10, 20],
        "block_out_channels": [320, 640, 1280],
        "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
        "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
        "transformer_layers_per_block": [1, 2, 10],
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    },
}
SMALL = {
    "sample_size": 8,
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "block_out_channels": [16, 32],
    "cross_attention_dim": 16,
    "attention_head_dim": 8,
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"],
}
TINY_NETWORKS = {
    "sd15": SMALL,
    "sdxl": {
        **SMALL,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 64,
    },
}
ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]


class Sized:
    """A UNet with LoRA, and the two passes through one step of a guided DDIM chain.

    Args:
        config: of `diffusers.UNet2DConditionModel`.
        device: where.
        checkpointing: of activations.
        rank: of the adapters.
    """

    def __init__(self, config: dict, device: str, checkpointing: bool, rank: int = 16) -> None:
        from diffusers import DDIMScheduler, UNet2DConditionModel
        from peft import LoraConfig

        self.device, self.config = torch.device(device), config
        torch.manual_seed(0)
        with self.device:
            network = UNet2DConditionModel(**config)
        torch.nn.Module.to(network, torch.bfloat16)  # diffusers' own warns of no module
        self.network = network.requires_grad_(False).eval()
        self.network.add_adapter(LoraConfig(r=rank, lora_alpha=rank, target_modules=ATTENTION))
        self.trained = [p for p in self.network.parameters() if p.requires_grad]
        for p in self.trained:
            p.data = p.data.float()
        if checkpointing:
            self.network.enable_gradient_checkpointing()
        self.optimizer = torch.optim.AdamW(self.trained, lr=1e-4)
        self.alpha_bar = DDIMScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear"
        ).alphas_cumprod.to(self.device)

    def inputs(self, images: int) -> dict:
        """Random latents x[i], x[i + 1] in float32, and prompts."""
        size, dtype = self.config["sample_size"], torch.bfloat16
        make = {"device": self.device, "dtype": torch.float32}
        width, tokens = self.config["cross_attention_dim"], 77
        found = {
            "x": torch.randn(images, 4, size, size, **make),
            "embeds": torch.randn(2 * images, tokens, width, **make).to(dtype),
            "added": None,
        }
        found["x_next"] = found["x"] + 0.01 * torch.randn(images, 4, size, size, **make)
        if self.config.get("addition_embed_type"):
            ids = self.config["addition_time_embed_dim"] * 6
            pooled = self.config["projection_class_embeddings_input_dim"] - ids
            found["added"] = {
                "text_embeds": torch.randn(2 * images, pooled, **make).to(dtype),
                "time_ids": torch.full((2 * images, 6), float(8 * size), **make).to(dtype),
            }
        return found

    def log_prob(self, given: dict, t: int = 501, t_next: int = 481, scale: float = 5.0):
        """log p(x[i+1] | x[i]) of a DDIM step with eta = 1, ``(b,)`` nats."""
        x = given["x"]
        output = self.network(
            torch.cat([x, x]).to(torch.bfloat16), t, encoder_hidden_states=given["embeds"],
            added_cond_kwargs=given["added"], return_dict=False,
        )[0].float()  # fmt: skip
        without, with_prompt = output.chunk(2)
        eps = without + scale * (with_prompt - without)
        now, after = self.alpha_bar[t], self.alpha_bar[t_next]
        std = ((1 - after) / (1 - now) * (1 - now / after)).sqrt()
        x0 = (x - (1 - now).sqrt() * eps) / now.sqrt()
        mean = after.sqrt() * x0 + (1 - after - std**2).sqrt() * eps
        return -0.5 * (((given["x_next"] - mean) / std) ** 2).flatten(1).sum(1)

    def first_pass(self, given: dict) -> torch.Tensor:
        with torch.no_grad():
            return self.log_prob(given)

    def second_pass(self, given: dict) -> None:
        """The gradient of a weighted sum of the step's log-probabilities."""
        (1e-6 * self.log_prob(given)).sum().backward()

    def update(self, images: int) -> None:
        """One step of the chain in both passes, and the optimizer."""
        given = self.inputs(images)
        self.first_pass(given)
        self.second_pass(given)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def peak(self, images: int) -> int:
        """Bytes: on CUDA all that are allocated, else those that autograd keeps.

        The latter do not show what checkpointing computes anew on the way back.
        """
        if self.device.type != "cuda":
            with SavedBytes(self.network.parameters()) as saved:
                self.update(images)
            return saved.peak
        torch.cuda.reset_peak_memory_stats()
        self.update(images)
        return torch.cuda.max_memory_allocated()

    def fits(self, images: int, limit: int) -> bool:
        """Whether an update stays below ``limit`` bytes."""
        if self.device.type != "cuda":
            return self.peak(images) <= limit
        total = torch.cuda.get_device_properties(self.device).total_memory
        torch.cuda.empty_cache()
        torch.cuda.set_per_process_memory_fraction(min(1.0, limit / total))
        try:
            self.update(images)
            enough = True
        except torch.cuda.OutOfMemoryError:
            enough = False
        self.optimizer.zero_grad(set_to_none=True)
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.set_per_process_memory_fraction(1.0)
        return enough


def largest(fits, guess: int) -> int:
    """The largest n >= 0 with ``fits(n)``, to 5 %, for a ``fits`` that is true up to a limit."""
    low, high, n = 0, None, max(1, guess)
    while high is None or high - low > max(1, low // 20):
        if fits(n):
            low = n
            n = max(low + 1, low + low // 10) if high is None else (low + high) // 2
        else:
            high = n
            n = max(low + 1, high - max(1, high // 10)) if low == 0 else (low + high) // 2
    return low


def sized(args) -> dict:
    networks = TINY_NETWORKS if args.tiny else NETWORKS
    cuda = torch.device(args.device).type == "cuda"
    if not (cuda or args.tiny):
        return {"skipped": "needs --device cuda"}
    found = {}
    for name in args.networks:
        for checkpointing in (False, True):
            work = Sized(networks[name], args.device, checkpointing)
            work.update(1)  # the optimizer's state is there from here on
            one, three = work.peak(1), work.peak(3)
            each = max(1, (three - one) // 2)
            here = {"trained_parameters": sum(p.numel() for p in work.trained)}
            here["first_image_mib"], here["further_image_mib"] = (
                round(n / 2**20, 2) for n in (one, each)
            )
            for limit in args.limits:
                # what the driver and the context take is not to be had
                allowed = round(0.96 * limit) if cuda else round(limit)
                if cuda and allowed > torch.cuda.get_device_properties(0).total_memory:
                    here[f"{limit / GB:g} GB"] = "not on this device"
                    continue
                guess = max(1, (allowed - one) // each + 1)
                batch = largest(lambda n, m=allowed, w=work: w.fits(n, m), guess)
                here[f"{limit / GB:g} GB"] = timing(work, batch, args) if batch else "none fits"
            found[f"{name}{', checkpointing' if checkpointing else ''}"] = here
            del work
            gc.collect()
            if cuda:
                torch.cuda.empty_cache()
    return found


def timing(work: Sized, batch: int, args) -> dict:
    """Seconds of one step's passes at this batch, and of an update with all steps from them."""
    given = work.inputs(batch)
    arms = {
        "first pass": lambda: work.first_pass(given),
        "second pass": lambda: work.second_pass(given),
    }
    seconds = alternate(arms, args.repeats, args.device)
    work.optimizer.zero_grad(set_to_none=True)
    first, second = (statistics.median(seconds[name]) for name in arms)
    step = first + second
    return {
        "images": batch,
        "seconds_of_a_step": {"first pass": round(first, 4), "second pass": round(second, 4)},
        f"seconds_of_an_update ({args.sized_steps} steps, from one)": round(
            step * args.sized_steps, 2
        ),
        "images_per_second": round(batch / (step * args.sized_steps), 4),
    }


# --------------------------------------------------------------------------------------------

PARTS = {"passes": passes, "pipeline": pipeline, "sized": sized}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parts", nargs="+", choices=PARTS, help="default: all, sized on CUDA")
    parser.add_argument("--tiny", action="store_true", help="2 images, small networks")
    parser.add_argument("--model", default="embedded:emoji")
    parser.add_argument("--reward", default="clip_score")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, help="of torch")
    parser.add_argument("--num_steps", type=int, nargs="+", help="default: 4 8 16")
    parser.add_argument("--prompts", type=int, help="default: 4")
    parser.add_argument("--samples", type=int, help="of each prompt; default: 4")
    parser.add_argument("--repeats", type=int, help="default: 5")
    parser.add_argument("--no_peaks", action="store_true", help="no processes for peak memory")
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--limits", type=float, nargs="+", help="bytes; default: 24e9 80e9")
    parser.add_argument("--sized_steps", type=int, default=50, help="of the chain in `sized`")
    parser.add_argument("--peak_of", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    args.num_steps = args.num_steps or ([1, 2] if args.tiny else [4, 8, 16])
    args.prompts = args.prompts or (1 if args.tiny else 4)
    args.samples = args.samples or (2 if args.tiny else 4)
    args.repeats = args.repeats or (1 if args.tiny else 5)
    args.limits = args.limits or ([2e6] if args.tiny else [24 * GB, 80 * GB])
    cuda = torch.device(args.device).type == "cuda"
    args.parts = args.parts or [p for p in PARTS if p != "sized" or cuda or args.tiny]
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.peak_of:
        print(peak_of(args))
        return
    found = {
        "device": torch.cuda.get_device_name() if cuda else "cpu",
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "python": sys.version.split()[0],
        "torch": torch.__version__,
    }
    found |= {part: PARTS[part](args) for part in args.parts}
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
