"""ImageReward: human preference for text-to-image (Xu et al. 2023, arXiv:2304.05977).

The image goes through BLIP's vision transformer; BLIP's text encoder reads the prompt, looking at
the image through cross-attention in every layer; a multilayer perceptron turns what comes out at
the first token into a number, which is standardised:

    r = (mlp(text_encoder(prompt, vit(image))[0]) - MEAN) / STD

The published checkpoint is read into the BLIP modules of transformers as it is.
"""

import json
import math
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from diffreward.rewards.base import Scores, register_reward
from diffreward.rewards.towers import Preprocess
from diffreward.samples import Samples

# The published model's mean and standard deviation over its authors' images.
MEAN, STD = 0.16717362830052426, 1.0333394966054072
MAX_TOKENS = 35

_CHECKPOINTS = ("ImageReward.safetensors", "ImageReward.pt")
_CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
_CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
_HEAD_WIDTH = 64  # of an attention head in BLIP's vision transformers, base and large


@register_reward(
    "image_reward",
    modality="image",
    differentiable=True,
    needs_prompt=True,
    licence="Apache-2.0",
    weights="THUDM/ImageReward: ImageReward.pt and med_config.json; google-bert/bert-base-uncased",
    source="Xu et al. 2023 (ImageReward), arXiv:2304.05977",
)
class ImageReward:
    """ImageReward: what people prefer for a prompt, standardised: 0 is average, 1 good.

    Differentiable in the images unless ``exact``. Networks are frozen, in eval mode and in
    float32; they follow the samples' device.

    Args:
        path: hub id, folder or checkpoint file in the published layout: ``ImageReward.pt`` (or
            ``.safetensors`` with the same names) and beside it ``med_config.json``.
        tokenizer: hub id or folder of BERT's tokenizer; by default the checkpoint's folder if
            that has one, otherwise ``google-bert/bert-base-uncased``.
        exact: resize in PIL with 8-bit rounding, as the original does; not differentiable.
        chunk_size: images given to the networks at once.

    Raises:
        FileNotFoundError: the checkpoint or its ``med_config.json`` is missing.
        ValueError: the checkpoint lacks weights or has others than its configuration says, or
            the tokenizer has more tokens than the network.
        OSError: a download failed.
    """

    def __init__(
        self,
        path: str = "THUDM/ImageReward",
        tokenizer: str | None = None,
        exact: bool = False,
        chunk_size: int = 32,
    ) -> None:
        if chunk_size < 1:
            raise ValueError(f"chunk_size must be at least 1, but {chunk_size} came")
        self.chunk_size = chunk_size
        checkpoint, config = _find(path)
        # Not in the caller's inference mode: the weights must stay usable for gradients.
        with torch.inference_mode(False):
            self.network = _load(_read(checkpoint), json.loads(config.read_text()), path)
        self.network.requires_grad_(False).eval()
        self._tokenizer = _load_tokenizer(tokenizer, checkpoint.parent)
        if len(self._tokenizer) > self.network.vocabulary:
            raise ValueError(
                f"the tokenizer has {len(self._tokenizer)} tokens, but the network of {path!r} "
                f"knows {self.network.vocabulary}; pass tokenizer=, that of bert-base-uncased"
            )
        side = self.network.image_size
        self.preprocess = Preprocess((side, side), _CLIP_MEAN, _CLIP_STD, exact=exact)
        self.info = replace(type(self).info, weights=str(path), differentiable=not exact)

    def __call__(self, samples: Samples) -> Scores:
        return self.score_prepared(self.preprocess(samples.data), samples.prompts)

    def score_prepared(
        self, prepared: Float[Tensor, "b 3 H W"], prompts: Sequence[str] | None
    ) -> Scores:
        """The scores of images that ``preprocess`` has made, each with its prompt.

        Raises:
            ValueError: there are no prompts, or not as many as images.
        """
        if prompts is None or len(prompts) != len(prepared):
            came = "none came" if prompts is None else f"{len(prompts)} came"
            raise ValueError(f"image_reward needs {len(prepared)} prompts, but {came}")
        self.to(prepared.device)
        ids, mask = (tensor.to(prepared.device) for tensor in self._tokenize(prompts))
        chunks = zip(*(t.split(self.chunk_size) for t in (prepared, ids, mask)), strict=True)
        return Scores(torch.cat([self.network(*chunk) for chunk in chunks]))

    def to(self, device: torch.device | str) -> "ImageReward":
        """Move the network; a call does this by itself to where its samples are."""
        device = torch.device(device)
        if next(self.network.parameters()).device != device:
            with torch.inference_mode(False):
                self.network.to(device)
        return self

    def _tokenize(self, prompts: Sequence[str]) -> tuple[Int[Tensor, "b l"], Int[Tensor, "b l"]]:
        """Token ids and mask. The first token is [CLS], to which BLIP's own [ENC] was not set."""
        prompts = list(prompts)
        for prompt, ids in zip(prompts, self._tokenizer(prompts)["input_ids"], strict=True):
            if len(ids) > MAX_TOKENS:
                warnings.warn(
                    f"reward 'image_reward' reads only the first {MAX_TOKENS} tokens of {prompt!r}",
                    stacklevel=3,
                )
        # Always to the same length, so that round-off does not depend on the other prompts.
        tokens = self._tokenizer(
            prompts,
            padding="max_length",
            truncation=True,
            max_length=MAX_TOKENS,
            return_tensors="pt",
        )
        return tokens["input_ids"], tokens["attention_mask"]


class _Network(nn.Module):
    """BLIP's vision transformer and image-grounded text encoder, and the head."""

    def __init__(self, vision: nn.Module, text: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.vision, self.text, self.head = vision, text, head
        self.image_size: int = vision.config.image_size
        self.vocabulary: int = text.config.vocab_size

    def forward(
        self,
        images: Float[Tensor, "b 3 H W"],
        ids: Int[Tensor, "b l"],
        mask: Int[Tensor, "b l"],
    ) -> Float[Tensor, " b"]:
        seen = self.vision(images).last_hidden_state
        read = self.text(ids, attention_mask=mask, encoder_hidden_states=seen).last_hidden_state
        return (self.head(read[:, 0]).squeeze(-1) - MEAN) / STD


# --------------------------------------------------------------------------------------------
# The published checkpoint
# --------------------------------------------------------------------------------------------


def _find(path: str) -> tuple[Path, Path]:
    """The checkpoint and its med_config.json; downloaded if ``path`` is a hub id."""
    local = Path(path).expanduser()
    if local.is_file():
        checkpoint = local
    elif local.is_dir():
        found = [local / name for name in _CHECKPOINTS if (local / name).is_file()]
        if not found:
            raise FileNotFoundError(f"{local} has neither {' nor '.join(_CHECKPOINTS)}")
        checkpoint = found[0]
    elif re.fullmatch(r"[\w.-]+/[\w.-]+", str(path)) and not str(path).startswith("."):
        from huggingface_hub import hf_hub_download

        checkpoint = hf_hub_download(path, _CHECKPOINTS[1])
        return Path(checkpoint), Path(hf_hub_download(path, "med_config.json"))
    else:
        raise FileNotFoundError(f"{path} is neither a file, nor a folder, nor a hub id")
    config = checkpoint.with_name("med_config.json")
    if not config.is_file():
        raise FileNotFoundError(
            f"{config} is missing: it is published beside the checkpoint, and says how wide and "
            "deep the text encoder is"
        )
    return checkpoint, config


def _read(checkpoint: Path) -> dict[str, Tensor]:
    if checkpoint.suffix == ".safetensors":
        from safetensors.torch import load_file

        return load_file(checkpoint)
    return torch.load(checkpoint, map_location="cpu", weights_only=True)


def _load_tokenizer(name: str | None, folder: Path):
    from transformers import BertTokenizer

    if name is None:
        own = any((folder / file).is_file() for file in ("tokenizer.json", "vocab.txt"))
        name = str(folder) if own else "google-bert/bert-base-uncased"
    tokenizer = BertTokenizer.from_pretrained(name)
    tokenizer.add_tokens(["[DEC]", "[ENC]"], special_tokens=True)  # BLIP's, in this order
    return tokenizer


def _load(weights: Mapping[str, Tensor], config: dict, path: str) -> _Network:
    """The published names and shapes as modules of transformers."""
    from transformers import BlipTextConfig, BlipTextModel, BlipVisionConfig, BlipVisionModel

    def under(prefix: str) -> dict[str, Tensor]:
        start = len(prefix)
        return {n[start:]: w.float() for n, w in weights.items() if n.startswith(prefix)}

    vision, text = under("blip.visual_encoder."), under("blip.text_encoder.")
    head = under("mlp.layers.")
    for part, needed in ((vision, "patch_embed.proj.weight"), (head, "0.weight")):
        if needed not in part:
            raise ValueError(
                f"{path!r} is no checkpoint of ImageReward: it has no weight named "
                f"...{needed}, but {', '.join(list(weights)[:3])}, ..."
            )
    vision = {_vision_name(name): weight for name, weight in vision.items()}
    text.pop("embeddings.position_ids", None)  # 0, 1, 2, ...
    patch = vision["embeddings.patch_embedding.weight"]  # (width, 3, patch, patch)
    places = vision["embeddings.position_embedding"].shape[1] - 1
    width, size = patch.shape[0], patch.shape[-1]
    vision_config = BlipVisionConfig(
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=_count(vision, r"encoder\.layers\.(\d+)\."),
        num_attention_heads=width // _HEAD_WIDTH,
        image_size=math.isqrt(places) * size,
        patch_size=size,
        layer_norm_eps=1e-6,
    )
    named = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size",
             "max_position_embeddings", "vocab_size", "hidden_act", "layer_norm_eps",
             "pad_token_id")  # fmt: skip
    text_config = BlipTextConfig(
        encoder_hidden_size=width, **{name: config[name] for name in named if name in config}
    )
    return _Network(
        _fill(BlipVisionModel, vision_config, vision, path),
        _fill(BlipTextModel, text_config, text, path, add_pooling_layer=False),
        _linears(head),
    )


def _vision_name(name: str) -> str:
    """A weight of BLIP's own vision transformer, as transformers calls it."""
    for pattern, ours in (
        (r"^cls_token$", "embeddings.class_embedding"),
        (r"^pos_embed$", "embeddings.position_embedding"),
        (r"^patch_embed\.proj\.", "embeddings.patch_embedding."),
        (r"^norm\.", "post_layernorm."),
        (r"^blocks\.", "encoder.layers."),
        (r"\.norm([12])\.", r".layer_norm\1."),
        (r"\.attn\.proj\.", ".self_attn.projection."),
        (r"\.attn\.qkv\.", ".self_attn.qkv."),
    ):
        name = re.sub(pattern, ours, name)
    return name


def _count(weights: Mapping[str, Tensor], pattern: str) -> int:
    return len({match[1] for name in weights if (match := re.match(pattern, name))})


def _fill(model, config, weights: dict[str, Tensor], path: str, **options) -> nn.Module:
    """A transformers model with just these weights."""
    network, report = model.from_pretrained(
        None,
        config=config,
        state_dict=weights,
        dtype=torch.float32,
        ignore_mismatched_sizes=True,  # they are in the report
        output_loading_info=True,
        **options,
    )
    for what, names in (
        ("lacks", report["missing_keys"]),
        ("does not need, but has,", report["unexpected_keys"]),
        ("has in another shape", report["mismatched_keys"]),
    ):
        if names:
            first = sorted(map(str, names))[0]
            raise ValueError(
                f"{path!r} and its med_config.json do not fit: it {what} {first} "
                f"({len(names)} in all) of {model.__name__}"
            )
    return network


def _linears(weights: dict[str, Tensor]) -> nn.Sequential:
    """The head: linear layers only; between them were dropouts, and no activations."""
    layers = []
    for n in sorted(int(name.split(".")[0]) for name in weights if name.endswith(".weight")):
        out, into = weights[f"{n}.weight"].shape
        layer = nn.Linear(into, out, device="meta")
        own = {name: weights[f"{n}.{name}"] for name in ("weight", "bias")}
        layer.load_state_dict(own, assign=True)
        layers.append(layer)
    return nn.Sequential(*layers)
