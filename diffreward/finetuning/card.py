"""The model card of a finetuned model, and its way to the hub."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from jaxtyping import Float
from torch import Tensor

from diffreward.files import plain, table
from diffreward.finetuning.figures import summary
from diffreward.finetuning.monitor import Evaluation, paired
from diffreward.samples import ALPHABETS


@dataclass(frozen=True)
class Card:
    """What the model card says about where the model comes from.

    Attributes:
        model: the pretrained model: a hub id, a folder, or "embedded:...".
        algorithm: its name.
        reward: what was trained on, in words or as its spec.
        iterations: done.
        method: "lora" or "full".
        options: hyper-parameters, name -> value.
        prompts: training prompts: how many, or from where.
        loading: Python code that loads the result; None: `loading_code`.
        note: one more sentence, say why the run stopped early.
        controller: of a model with control images, the option that loads what reads them
            ("controlnet", "adapter"), its value, and which network was trained ("control", "base").
    """

    model: str
    algorithm: str
    reward: str
    iterations: int
    method: str = "lora"
    options: dict[str, Any] = field(default_factory=dict)
    prompts: str = ""
    loading: str | None = None
    note: str = ""
    controller: tuple[str, str, str] | None = None


def front_matter(card: Card, *, sequences: bool = False) -> str:
    """The hub's metadata. The licence is that of the pretrained model, which is not known here."""
    about: dict[str, Any] = {
        "library_name": "diffreward" if sequences else "diffusers",
        "license": "other",
        "license_name": "that-of-the-base-model",
        "tags": [
            "diffusion",
            "reward-finetuning",
            "diffreward",
            card.algorithm.lower(),
            *(["lora"] if card.method == "lora" else []),
        ],
    }
    if is_hub_id(card.model):
        about["base_model"] = card.model
        about["base_model_relation"] = "adapter" if card.method == "lora" else "finetune"
    return f"---\n{yaml.safe_dump(about, sort_keys=False, allow_unicode=True)}---\n"


def is_hub_id(model: str) -> bool:
    """Whether it can be a hub id ``owner/name``, and is no folder."""
    word = r"[A-Za-z0-9][\w.-]*"
    return re.fullmatch(f"{word}/{word}", model) is not None and not Path(model).exists()


def loading_code(card: Card, *, sequences: bool = False) -> str:
    """Python that loads the result: of a pipeline, or of a policy of sequences."""
    if sequences:
        lines = [
            "from diffreward import load_policy",
            "",
            f"policy = load_policy({card.model!r})  # with the model options of config.yaml",
        ]
        if card.method == "lora":
            lines[:1] = [lines[0], "from diffreward.policies import load_lora"]
            return "\n".join([*lines, 'load_lora(policy, "final", fuse=True)'])
        lines[:1] = ["from safetensors.torch import load_model", "", lines[0]]
        return "\n".join([*lines, 'load_model(policy.denoiser, "final/model.safetensors")'])
    if card.controller is not None:
        kind, own, trained = card.controller
        model, final = repr(card.model), {kind: own}
        if card.method == "lora":
            final["lora"] = "final"
        elif trained == "control":
            final[kind] = "final"
        else:
            model = '"final"'
        if trained == "base":
            final["train"] = "base"
        options = ", ".join(f"{name}={value!r}" for name, value in final.items())
        return f"from diffreward import load_policy\n\npolicy = load_policy({model}, {options})"
    if card.model.startswith("embedded:") and card.method == "lora":
        return (
            f"from diffreward import load_policy\n\n"
            f'policy = load_policy({card.model!r}, lora="final")'
        )
    lines = ["from diffusers import DiffusionPipeline", ""]
    if card.method == "full":
        return "\n".join([*lines, 'pipe = DiffusionPipeline.from_pretrained("final")'])
    lines += [
        f"pipe = DiffusionPipeline.from_pretrained({card.model!r})",
        'pipe.load_lora_weights("final")  # or the hub id of this page, subfolder="final"',
    ]
    return "\n".join(lines)


def comparison(before: Evaluation, after: Evaluation) -> str:
    """The table of before and after, in Markdown."""
    rows = []
    for label in after.scores:
        change = paired(before.scores[label], after.scores[label])
        role = "trained" if label == after.trained else "held out"
        if not change.count:
            rows.append([f"{label} ({role})", "", "", "", "cannot be judged", "0"])
            continue
        known = (before.scores[label] - after.scores[label]).isfinite()
        means = [e.scores[label][known].double().mean().item() for e in (before, after)]
        low, high = change.interval
        interval = f"{low:+.4g} to {high:+.4g}" if change.count > 1 else "one pair"
        rows.append(
            [
                f"{label} ({role})",
                *(f"{mean:.4g}" for mean in means),
                f"{change.mean:+.4g}",
                interval,
                str(change.count),
            ]
        )
    header = ["mean reward", "before", "after", "change", "95% interval", "pairs"]
    return table(header, rows, markdown=True)


def readme(
    card: Card, before: Evaluation, after: Evaluation, warnings: Sequence[tuple[int, str]],
    *, images: bool,
) -> str:  # fmt: skip
    """The model card, in Markdown with the hub's front matter."""
    what = "LoRA adapters" if card.method == "lora" else "All weights"
    count = f"{len(after.prompts)} prompts, {after.k} samples each"
    sequences = after.samples.modality in ALPHABETS
    # a LoRA of peft's format, which the pipeline does not read
    ours = sequences or (after.samples.modality == "audio" and card.method == "lora")
    trained = "the pipeline" if not sequences else "the trained network"
    lines = [
        front_matter(card, sequences=sequences),
        f"# {card.model}, finetuned with {card.algorithm}",
        "",
        f"{what} of `{card.model}`, finetuned towards the reward `{card.reward}` with "
        f"{card.algorithm} for {card.iterations} iterations"
        + (f" on {card.prompts}" if card.prompts else "")
        + ", by diffreward.",
        "",
        *([card.note, ""] if card.note else []),
        "## Before and after",
        "",
        comparison(before, after),
        "",
        f"Means over {count}, from the same noise before and after; the interval is of the mean "
        "of the paired differences, for new seeds of these prompts.",
        "",
        _verdict(before, after),
        "",
        *_distances_moved(before, after),
        "",
        "## Warnings",
        "",
        *_warnings(warnings),
        "",
        *(["![before and after](before_after.png)", ""] if images else []),
        *(_LOGOS if sequences else []),
        "![curves](curves.png)",
        "",
        "## Use",
        "",
        "```python",
        (card.loading or loading_code(card, sequences=ours)).strip(),
        "```",
        "",
        "## Hyper-parameters",
        "",
        table(
            ["option", "value"],
            [[f"`{name}`", _inline(value)] for name, value in card.options.items()],
            markdown=True,
            numbers=False,
        )
        if card.options
        else "See `config.yaml`.",
        "",
        "## Files",
        "",
        "| file | what it is |",
        "| --- | --- |",
        f"| `final/` | {'the adapters' if card.method == 'lora' else trained} |",
        *(["| `before_after.fasta` | the sequences, with their rewards |"] if sequences else []),
        "| `samples/` | the evaluations: pictures, if it makes any, and scores |",
        "| `metrics.jsonl` | one line per iteration and per evaluation |",
        "| `config.yaml` | the whole configuration |",
        "| `env.json` | versions, device, seed |",
        "",
        "The licence is that of the pretrained model; rewards may have terms of their own.",
        "",
    ]
    return "\n".join(lines)


_LOGOS = [
    "![logos, before above after](logos.png)",
    "",
    "Letters by position over all evaluated samples, in bits; the dotted line is what as many "
    "random letters would show.",
    "",
]


def _verdict(before: Evaluation, after: Evaluation) -> str:
    label = after.trained
    rose = paired(before.scores[label], after.scores[label]).mean > 0
    asked = f"`{label}` {'rose because it was asked to' if rose else 'did not rise'}; "
    if after.held_out:
        return (
            f"{asked}whether the samples became better is for the held-out rewards and your eyes "
            "to say."
        )
    return (
        f"{asked}no reward was held out, so nothing in this table says whether the samples became "
        "better."
    )


def _distances_moved(before: Evaluation, after: Evaluation) -> list[str]:
    lines = []
    if after.kl is not None:
        kl = after.kl.double()
        spread = f" (standard error {_se(kl):.2g})" if len(kl) > 1 else ""
        lines.append(f"- KL to the pretrained model: {kl.mean():.3g} nats per sample{spread}")
    was, is_ = before.diversity.mean().item(), after.diversity.mean().item()
    if not math.isnan(is_):
        share = f", {is_ / was:.0%} of before" if was > 0 else ""
        lines.append(f"- diversity within a prompt: {was:.3g} before, {is_:.3g} after{share}")
    for name, moved in summary(before, after)["probes"].items():
        was = before.probes[name].double().mean().item()
        lines.append(
            f"- {name}: {was:.3g} before, {moved['mean']:.3g} after "
            f"({moved['shift']:+.2f} standard deviations)"
        )
    return lines


def _warnings(warnings: Sequence[tuple[int, str]]) -> list[str]:
    if not warnings:
        return ["The guard against reward hacking gave none."]
    return [f"- after {iteration} iterations: {text}" for iteration, text in warnings]


def _se(values: Float[Tensor, " n"]) -> float:
    return values.std().item() / math.sqrt(len(values))


def _inline(value: Any) -> str:
    text = json.dumps(plain(value), ensure_ascii=False, default=str)
    return text.strip('"').replace("|", "\\|").replace("\n", " ")


# --------------------------------------------------------------------------------------------
# The hub
# --------------------------------------------------------------------------------------------


def check_hub(repo_id: str) -> None:
    """Refuse, before training, what could not be pushed afterwards.

    Raises:
        ValueError: the hub is switched off, or ``repo_id`` is no ``owner/name``.
    """
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        raise ValueError(
            f"push_to_hub={repo_id!r} needs the network, but HF_HUB_OFFLINE is set; unset it, or "
            "leave push_to_hub null and push the run's folder later"
        )
    if not is_hub_id(repo_id):
        raise ValueError(f"push_to_hub takes owner/name, but {repo_id!r} came")


def push_to_hub(folder: Path, repo_id: str, *, private: bool = False, api: Any = None) -> str:
    """Upload the folder of a run, but for its checkpoints and trackers; returns the address.

    Args:
        folder: of the run.
        repo_id: ``owner/name``; made if it is not there.
        private: whether a new one is.
        api: a `huggingface_hub.HfApi`; None: that of whoever is logged in.

    Raises:
        ValueError: see `check_hub`.
        ConnectionError: the upload failed; nothing of the run is lost.
    """
    check_hub(repo_id)
    from huggingface_hub import HfApi

    api = HfApi() if api is None else api
    try:
        url = api.create_repo(repo_id, private=private, exist_ok=True)
        api.upload_folder(
            repo_id=repo_id,
            folder_path=str(folder),
            commit_message="diffreward finetune",
            ignore_patterns=[
                "checkpoints/*", "tensorboard/*", "wandb/*", "samples/*.safetensors",
                "*.unfinished-*",
            ],
        )  # fmt: skip
    except Exception as err:  # whose class depends on the HTTP client that the hub is built on
        raise ConnectionError(
            f"could not push to {repo_id}: {err}. The run is whole in {folder}; log in with "
            f"'hf auth login' if that was missing, then: hf upload {repo_id} {folder} "
            "--exclude 'checkpoints/*'"
        ) from err
    return str(url)
