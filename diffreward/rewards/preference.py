"""Image rewards trained on what people prefer: PickScore, HPSv2, and an aesthetic rating on SigLIP.

Their weights are not shipped: they come from the Hugging Face hub, or from a file or folder.
"""

import math
from dataclasses import replace
from pathlib import Path

from diffreward.rewards.base import RewardInfo, register_reward
from diffreward.rewards.image import AestheticScore, load_linear_head
from diffreward.rewards.towers import CosineReward, load_open_clip, load_transformers
from diffreward.rewards.weights import weights_file

# --------------------------------------------------------------------------------------------
# PickScore
# --------------------------------------------------------------------------------------------

_PICKSCORE_WEIGHTS = "yuvalkirstain/PickScore_v1"
_PICKSCORE = dict(
    modality="image",
    differentiable=True,
    needs_prompt=True,
    licence="not stated with the weights; MIT (the CLIP they were finetuned from)",
    source="Kirstain et al. 2023, Pick-a-Pic, arXiv:2305.01569",
)


@register_reward("pickscore", weights=_PICKSCORE_WEIGHTS, **_PICKSCORE)
def pickscore(
    model: str = _PICKSCORE_WEIGHTS,
    processor: str | None = None,
    scaled: bool = True,
    chunk_size: int = 64,
    exact: bool = False,
) -> CosineReward:
    """Preference for an image among others of its prompt: a cosine times the logit scale.

    The published number, about 21 for pictures of Stable Diffusion 1.4. Differences of one
    prompt's images mean something (a softmax over them is the probability to be preferred);
    those between prompts do not.

    Args:
        model: hub id or folder of a CLIP in transformers' layout.
        processor: the same for its tokenizer and image processor; by default ``model``, but for
            the published weights the CLIP they were finetuned from, as the authors do.
        scaled: False: the plain cosine, in [-1, 1].
        chunk_size: images (or new prompts) given to the network at once.
        exact: resize in PIL with 8 bits, as the original does; without gradient.
    """
    if processor is None and model == _PICKSCORE_WEIGHTS:
        processor = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
    tower = load_transformers(model, processor)
    scale = tower.logit_scale if scaled else 1.0
    info = RewardInfo(
        name="pickscore",
        weights=model,
        range=(-scale, scale),
        description=f"PickScore, {model}" + ("" if scaled else ", cosine"),
        **_PICKSCORE,
    )
    return CosineReward(info, tower, scale=scale, exact=exact, chunk_size=chunk_size)


# --------------------------------------------------------------------------------------------
# HPSv2
# --------------------------------------------------------------------------------------------

_HPSV2_FILES = {"2.0": "HPS_v2_compressed.pt", "2.1": "HPS_v2.1_compressed.pt"}
_HPSV2 = dict(
    modality="image",
    differentiable=True,
    needs_prompt=True,
    range=(-1.0, 1.0),
    licence="Apache-2.0",
    source="Wu et al. 2023, Human Preference Score v2, arXiv:2306.09341",
)


@register_reward("hpsv2", weights="xswu/HPSv2/HPS_v2.1_compressed.pt", **_HPSV2)
def hpsv2(
    version: str | float = "2.1",
    weights: str | None = None,
    model: str = "ViT-H-14",
    chunk_size: int = 64,
    exact: bool = False,
) -> CosineReward:
    """Human Preference Score v2: a cosine; the paper's tables are 100 times it.

    Means of text-to-image models in the authors' benchmark: 0.24 to 0.28 (2.0), 0.15 to 0.31 (2.1).

    The image is letterboxed, not cropped: its longer side becomes 224 and black bars are added.
    As the authors resize in float, keeping what bicubic overshoots, this is their computation and
    has a gradient all the same. Compare images of one prompt, and scores of one version only.

    Args:
        version: ``"2.0"`` or ``"2.1"``, where ``weights`` does not name a file.
        weights: the checkpoint, a folder that holds it under its published name, or
            ``ORG/REPO/FILE`` on the hub; by default ``xswu/HPSv2``.
        model: open_clip's name of its architecture.
        chunk_size: images (or new prompts) given to the network at once.
        exact: round the image to 8 bits first, as if it were read from a file; without gradient.

    Raises:
        FileNotFoundError: the checkpoint is missing and cannot be downloaded.
        ValueError: an unknown version or architecture.
    """
    version = str(version).removeprefix("v")
    if version not in _HPSV2_FILES:
        raise ValueError(f"HPSv2 comes in {' and '.join(_HPSV2_FILES)}, but version {version} came")
    named = weights or "xswu/HPSv2"
    if weights is None or Path(weights).expanduser().is_dir():
        named = f"{named}/{_HPSV2_FILES[version]}"
    tower = load_open_clip(model, weights_file(named))
    info = RewardInfo(name="hpsv2", weights=named, description=f"HPSv2, {named}", **_HPSV2)
    letterbox = replace(tower.preprocess, resize_mode="longest", fill=0.0, clip=False)
    return CosineReward(info, tower, preprocess=letterbox, exact=exact, chunk_size=chunk_size)


# --------------------------------------------------------------------------------------------
# Aesthetic predictor v2.5
# --------------------------------------------------------------------------------------------

_SIGLIP = "google/siglip-so400m-patch14-384"
_SIGLIP_HEAD = (
    "https://github.com/discus0434/aesthetic-predictor-v2-5/raw/main/models/"
    "aesthetic_predictor_v2_5.pth"
)
_SIGLIP_AESTHETIC = dict(
    modality="image",
    differentiable=True,
    range=(-math.inf, math.inf),
    licence="AGPL-3.0 (head); Apache-2.0 (SigLIP)",
    source="discus0434 2024, aesthetic-predictor-v2-5; SigLIP, arXiv:2303.15343",
)


@register_reward("siglip_aesthetic", weights=f"{_SIGLIP} + {_SIGLIP_HEAD}", **_SIGLIP_AESTHETIC)
def siglip_aesthetic(
    head: str = _SIGLIP_HEAD,
    model: str = _SIGLIP,
    chunk_size: int = 64,
    exact: bool = False,
) -> AestheticScore:
    """Aesthetic predictor v2.5: a rating from 1 to 10 by a head on SigLIP; 5.5 is high already.

    Args:
        head: its weights, ``aesthetic_predictor_v2_5.pth``: a file, a URL, or ``ORG/REPO/FILE``
            on the hub. Mind its licence.
        model: hub id or folder, in transformers' layout, of the SigLIP it was trained on; the
            vision side is enough.
        chunk_size: images given to the network at once.
        exact: resize in PIL with 8 bits, as the original does; without gradient.

    Raises:
        FileNotFoundError: the head is missing and cannot be downloaded.
        ValueError: the head's file has not the published layout.
    """
    mlp = load_linear_head(head, [f"scoring_head.{i}" for i in (0, 2, 4, 6, 8)])
    info = RewardInfo(
        name="siglip_aesthetic",
        weights=f"{model} + {head}",
        description=f"aesthetic predictor v2.5, {model}",
        **_SIGLIP_AESTHETIC,
    )
    tower = load_transformers(model, text=False)
    return AestheticScore(info, tower, head=mlp, exact=exact, chunk_size=chunk_size)
