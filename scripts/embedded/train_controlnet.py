"""Train the embedded ControlNet, which holds the embedded text-to-image model to a control image.

    nice -n 5 python -m scripts.embedded.train_controlnet DATA --minutes 40
    python -m scripts.embedded.train_controlnet DATA --export assets/controlnet
    python -m scripts.embedded.train_controlnet DATA --evaluate

One network for three kinds of control images, which it tells apart by their looks: soft edges
(white lines on black), colour regions (a segmentation), and low-frequency luma (a grey grid); see
`diffreward.rewards.control`. The pictures are "embedded:scenes" from number 100,000 on, drawn and
encoded at the first call (DATA/scenes.safetensors); those which are held out from the text-to-image
model are left out. The network starts as a copy of the UNet's encoder. It is trained on the loss of
the UNet, which is frozen: v-prediction, EMA. Half of the captions are empty, so that
there is something to learn from the control image. It resumes from DATA/controlnet.pt; a longer
``--minutes`` extends it.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import ControlNetModel
from diffusers.models.attention_processor import AttnProcessor
from jaxtyping import Float, UInt8
from safetensors.torch import load_file, save_file
from torch import Tensor

from diffreward import evaluate as score
from diffreward import load_policy, make_reward, rollout, sample_generators
from diffreward.controlled import SCENES, read_controlled
from diffreward.pictures import Cell, image_grid, save_image
from diffreward.rewards.control import make_extractor
from diffreward.rewards.shapes import parse
from scripts.embedded.common import Clock, save, schedule

BATCH, RATE, NEW_RATE, EMA = 32, 2e-4, 2e-3, 0.99
NOISY = 0.3  # times are 1000 u^x, x from NOISY to 1: first where the control image says most
FIRST, COUNT, EMPTY = 100_000, 8_192, 0.5
CHANNELS = (16, 32, 64, 128)  # of the layers that read the control image
KINDS = {"edges": "edges", "segmentation": "segmentation", "luma": "luma"}


@torch.no_grad()
def scenes(
    data: Path, policy
) -> tuple[list[str], UInt8[Tensor, "n 3 64 64"], Float[Tensor, "n 16 8 8"]]:
    """Captions, pictures and latents; the latter are kept, in half precision."""
    source = read_controlled(SCENES, first=FIRST, count=COUNT)
    source = source.take([i for i, p in enumerate(source.prompts) if not parse(p).held_out()])
    path = data / "scenes.safetensors"
    if not path.exists():
        found = []
        for rows in torch.arange(len(source)).split(64):
            drawn = source.load(rows.tolist())
            latents = policy.encode_samples(drawn).half()
            found.append(((drawn.data * 255).round().to(torch.uint8), latents))
        pictures, latents = (torch.cat(each).contiguous() for each in zip(*found, strict=True))
        save_file({"pictures": pictures, "latents": latents}, path)
    kept = load_file(path)
    return source.prompts, kept["pictures"], kept["latents"].float()


def build(unet) -> ControlNetModel:
    net = ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=CHANNELS)
    # diffusers has 0 here, too; behind the zero layers at the end that only delays the start
    torch.nn.init.kaiming_normal_(net.controlnet_cond_embedding.conv_out.weight)
    return net


def groups(net: ControlNetModel) -> list[dict]:
    """What is new learns faster than what is copied."""
    new = [p for name, p in net.named_parameters() if name.startswith("controlnet_")]
    ids = {id(p) for p in new}
    copied = [p for p in net.parameters() if id(p) not in ids]
    return [{"params": copied, "rate": RATE}, {"params": new, "rate": NEW_RATE}]


def export(data: Path, folder: Path) -> None:
    """The averaged weights in half precision, as ``from_pretrained`` reads them."""
    net = build(load_policy("embedded:emoji").pipe.unet)
    state = torch.load(data / "controlnet.pt", weights_only=True)
    net.load_state_dict(state["ema"])
    net.half().save_pretrained(folder)
    print(f"{folder}: {state['step']} steps of {BATCH}, {state['minutes']:.1f} min")


@torch.no_grad()
def evaluate(data: Path, count: int = 48) -> None:
    """How well the shipped network keeps conditions it has not seen; DATA/evaluation.png."""
    judges = {"edges": "control_edge_f1", "segmentation": "control_miou", "luma": "control_rmse"}
    rows: list[tuple[str, list[Cell]]] = []
    for kind, spec in KINDS.items():
        drawn = read_controlled(SCENES, spec, first=10_000, count=count).load(range(count))
        control, shown = drawn.context["control"], {}
        for scale in (0.0, 1.0):
            policy = load_policy(
                "embedded:emoji", controlnet="embedded:controlnet", num_steps=20,
                guidance_scale=1.0, control_scale=scale,
            )  # fmt: skip
            for texts in ("captions", "no captions"):
                prompts = drawn.prompts if texts == "captions" else [""] * count
                condition = policy.encode(prompts, control=control)
                noise = sample_generators(0, count, 1)
                samples = policy.decode(rollout(policy, condition, noise).final, condition)
                value = score(make_reward(judges[kind]), samples).value
                half = 1.96 * value.std().item() / count**0.5
                name = f"control x {scale:.0f}, {texts}"
                print(f"{kind}: {name}: {judges[kind]} {value.mean():.3f} +- {half:.3f}")
                shown[name] = samples.data
        columns = {"control image": control, "its picture": drawn.data, **shown}
        rows += [(f"{kind}: {drawn.prompts[i]}", [Cell(v[i]) for v in columns.values()])
                 for i in range(3)]  # fmt: skip
    save_image(data / "evaluation.png", image_grid(list(columns), rows, smallest=128))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("--minutes", type=float, default=40)
    parser.add_argument("--every", type=float, default=5, help="minutes between checkpoints")
    parser.add_argument("--export", type=Path, help="write the weights to this folder, no training")
    parser.add_argument("--evaluate", action="store_true", help="the shipped weights, no training")
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    args.data.mkdir(parents=True, exist_ok=True)
    if args.export:
        export(args.data, args.export)
        return
    if args.evaluate:
        evaluate(args.data)
        return
    policy = load_policy("embedded:emoji")
    pipe = policy.pipe
    unet = pipe.unet.requires_grad_(False)
    captions, pictures, clean = scenes(args.data, policy)
    known = {caption: k for k, caption in enumerate(dict.fromkeys(["", *captions]))}
    with torch.no_grad():
        hidden = [
            pipe.encode_prompt(list(known)[k : k + 256], "cpu", 1, False)[0]
            for k in range(0, len(known), 256)
        ]
    hidden = torch.cat(hidden)
    which = torch.tensor([known[caption] for caption in captions])
    extractors = {kind: make_extractor(spec) for kind, spec in KINDS.items()}

    net = build(unet)
    for each in (net, unet):  # the backward pass of fused attention is slow on a CPU
        each.set_attn_processor(AttnProcessor())
    parameters = list(net.parameters())
    optimiser = torch.optim.AdamW(groups(net), RATE, betas=(0.9, 0.99), weight_decay=0.01)
    step, clock, path = 0, Clock(), args.data / "controlnet.pt"
    ema = {name: value.clone() for name, value in net.state_dict().items()}
    if path.exists():
        state = torch.load(path, weights_only=True)
        net.load_state_dict(state["net"])
        optimiser.load_state_dict(state["optimiser"])
        ema, step, clock = state["ema"], state["step"], Clock(state["minutes"], state["cpu"])
    rng = torch.Generator().manual_seed(step)
    running, last, first = 0.0, clock.minutes, step

    def write() -> None:
        state = {"net": net.state_dict(), "ema": ema, "optimiser": optimiser.state_dict()}
        save(state | {"step": step, "minutes": clock.minutes, "cpu": clock.cpu_minutes}, path)

    net.train()
    while clock.minutes < args.minutes:
        for group in optimiser.param_groups:
            group["lr"] = group["rate"] * min(1, (step + 1 - first) / 50)
            group["lr"] *= schedule(clock.minutes / args.minutes, 0.5)
        some = torch.randint(len(clean), (BATCH,), generator=rng)
        images = pictures[some].float() / 255
        parts = zip(extractors.values(), images.tensor_split(len(extractors)), strict=True)
        control = torch.cat([extractor.control(part) for extractor, part in parts])
        empty = torch.rand(BATCH, generator=rng) < EMPTY
        text = hidden[which[some].masked_fill(empty, known[""])]
        # stratified, shuffled so that no kind is tied to a noise level
        u = torch.rand((), generator=rng) + torch.randperm(BATCH, generator=rng) / BATCH
        bent = NOISY + (1 - NOISY) * min(1, clock.minutes / args.minutes)
        t = (1000 * (u % 1) ** bent).long().clamp(max=999)
        z, noise = clean[some], torch.randn(clean[some].shape, generator=rng)
        x = pipe.scheduler.add_noise(z, noise, t)
        down, middle = net(x, t, text, control, return_dict=False)
        v = unet(
            x, t, text, down_block_additional_residuals=down,
            mid_block_additional_residual=middle,
        ).sample  # fmt: skip
        loss = F.mse_loss(v, pipe.scheduler.get_velocity(z, noise, t))
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimiser.step()
        step += 1
        decay = min(EMA, (1 + step) / (10 + step))
        for name, value in net.state_dict().items():
            ema[name].lerp_(value, 1 - decay)
        running = loss.item() if running == 0 else 0.98 * running + 0.02 * loss.item()
        if step % 50 == 0:
            print(
                f"step {step} {clock.minutes:.1f} min ({clock.cpu_minutes:.1f} CPU) "
                f"loss {running:.4f}",
                flush=True,
            )
        if clock.minutes - last > args.every:
            last = clock.minutes
            write()
    write()
    print(f"final: {step} steps of {BATCH}, {clock.minutes:.1f} min ({clock.cpu_minutes:.1f} CPU)")


if __name__ == "__main__":
    main()
