"""Rewards by models that read pictures: questions to a vision-language model, and OCR.

Both go through PIL with 8-bit pixels, as their processors want it: no gradient.
"""

import inspect
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from diffreward.rewards.base import Scores, register_reward
from diffreward.samples import Samples

QUESTION = 'Does this figure show "{prompt}"? Please answer yes or no.'  # of VQAScore


def _pictures(images: Float[Tensor, "b 3 h w"]) -> list[Image.Image]:
    """8-bit RGB pictures.

    Raises:
        ValueError: a sample is not finite; 8 bits would turn it into something that can be scored.
    """
    broken = ~images.detach().isfinite().flatten(1).all(dim=1)
    if broken.any():
        raise ValueError(f"sample {int(broken.nonzero()[0, 0])} has NaN or infinite pixels")
    pixels = (images.detach() * 255).round().clamp(0, 255).to(torch.uint8)
    return [Image.fromarray(picture) for picture in pixels.permute(0, 2, 3, 1).cpu().numpy()]


# --------------------------------------------------------------------------------------------
# Visual question answering
# --------------------------------------------------------------------------------------------


@register_reward(
    "vqa",
    modality="image",
    differentiable=False,
    needs_prompt=True,
    range=(0.0, 1.0),
    licence="that of the weights",
    weights="any vision-language model of transformers (option model)",
    source="Lin et al. 2024 (VQAScore), arXiv:2404.01291",
)
class VQA:
    """Probability that a vision-language model says yes when asked if the image shows the prompt.

    The probability of the first token of the answer, summed over the ways of writing the word
    that are one token: lower case and capitalised, with and without a space before. Questions
    are asked with the model's chat template where it has one, and batched only with others of the
    same length, so that there is no padding that could change an answer. The network is frozen,
    in eval mode, and follows the samples' device.

    Scores carry the parts ``yes`` and ``no``, the two probabilities: where they do not add up to
    about 1, the model wants to say something else, and its scores mean little.

    Args:
        model: hub id or folder of a model that ``AutoModelForImageTextToText`` can load, with its
            processor.
        question: what is asked; ``{prompt}`` stands for the prompt. A model without a chat
            template may need its own image token in it.
        normalise: P(yes) / (P(yes) + P(no)) in place of VQAScore's P(yes).
        answers: the words for yes and no, in the language of the question.
        dtype: of the weights, such as ``"bfloat16"``; ``"auto"``: as they were saved. Scores of
            half-precision weights vary a little with the size of the batch.
        chunk_size: questions given to the network at once.

    Raises:
        ValueError: the question has no ``{prompt}``, the checkpoint lacks weights, the processor
            takes no images, or an answer is not one token for the model.
        OSError: the weights could not be found or downloaded.
    """

    def __init__(
        self,
        model: str,
        question: str = QUESTION,
        normalise: bool = False,
        answers: Sequence[str] = ("yes", "no"),
        dtype: str = "auto",
        chunk_size: int = 8,
    ) -> None:
        if "{prompt}" not in question:
            raise ValueError(f"the question must contain {{prompt}}, but {question!r} came")
        if chunk_size < 1:
            raise ValueError(f"chunk_size must be at least 1, but {chunk_size} came")
        self.question, self.normalise, self.chunk_size = question, normalise, chunk_size
        self._load(model, dtype)
        yes, no = answers
        self._yes, self._no = self._tokens(yes), self._tokens(no)
        self.info = replace(type(self).info, weights=model)

    def __call__(self, samples: Samples) -> Scores:
        device = samples.data.device
        self.to(device)
        questions = [
            self._ask(picture, prompt)
            for picture, prompt in zip(_pictures(samples.data), samples.prompts, strict=True)
        ]
        logits = self._answer(questions)
        both = torch.stack([logits[:, ids].logsumexp(dim=1) for ids in (self._yes, self._no)])
        yes, no = (both - logits.logsumexp(dim=1)).exp()
        value = torch.sigmoid(both[0] - both[1]) if self.normalise else yes
        return Scores(value, parts={"yes": yes, "no": no})

    def to(self, device: torch.device | str) -> "VQA":
        """Move the network; a call does this by itself to where its samples are."""
        device = torch.device(device)
        if self.network.device != device:
            # Not in the caller's inference mode: the weights must stay usable afterwards.
            with torch.inference_mode(False):
                self.network.to(device)
        return self

    def _load(self, model: str, dtype: str) -> None:
        from transformers import AutoModelForImageTextToText, AutoProcessor

        self._processor = AutoProcessor.from_pretrained(model)
        if not hasattr(self._processor, "image_processor"):
            raise ValueError(
                f"the processor of {model!r} is a {type(self._processor).__name__}, which takes "
                "no images"
            )
        with torch.inference_mode(False):
            network, report = AutoModelForImageTextToText.from_pretrained(
                model, dtype=dtype, output_loading_info=True
            )
        if report["missing_keys"]:  # transformers gives them random weights
            raise ValueError(
                f"the checkpoint {model!r} lacks {len(report['missing_keys'])} weights, one of "
                f"them {min(report['missing_keys'])}"
            )
        self.network = network.requires_grad_(False).eval()
        self._forward_takes = set(inspect.signature(network.forward).parameters)

    def _tokens(self, answer: str) -> list[int]:
        """Ids of the tokens which are this word."""
        tokenizer = self._processor.tokenizer
        spellings = [s + w for w in (answer.lower(), answer.capitalize()) for s in ("", " ")]
        encoded = [tokenizer.encode(spelt, add_special_tokens=False) for spelt in spellings]
        ids = {ids[0] for ids in encoded if len(ids) == 1} - {tokenizer.unk_token_id}
        if not ids:
            raise ValueError(
                f"the answer {answer!r} is not one token for {tokenizer.name_or_path!r}; ask for "
                "other words with question= and answers="
            )
        return sorted(ids)

    def _ask(self, picture: Image.Image, prompt: str) -> dict[str, Any]:
        """What the network reads for one picture and prompt."""
        text = self.question.replace("{prompt}", prompt)
        if getattr(self._processor, "chat_template", None) is None:
            return dict(self._processor(images=[picture], text=[text], return_tensors="pt"))
        content = [{"type": "image", "image": picture}, {"type": "text", "text": text}]
        return dict(
            self._processor.apply_chat_template(
                [{"role": "user", "content": content}],
                add_generation_prompt=True,
                tokenize=True,
                return_dict=True,
                return_tensors="pt",
            )
        )

    def _answer(self, questions: list[dict[str, Any]]) -> Float[Tensor, "b v"]:
        """Float32 logits of the first token of each answer."""
        alike: dict[tuple, list[int]] = {}
        for i, question in enumerate(questions):
            shapes = (
                (k, v.shape) if isinstance(v, Tensor) else (k, i) for k, v in question.items()
            )
            alike.setdefault(tuple(shapes), []).append(i)
        logits: list[Tensor | None] = [None] * len(questions)
        for group in alike.values():
            for start in range(0, len(group), self.chunk_size):
                chunk = group[start : start + self.chunk_size]
                for i, row in zip(chunk, self._forward([questions[i] for i in chunk]), strict=True):
                    logits[i] = row
        return torch.stack(logits)

    def _forward(self, questions: list[dict[str, Any]]) -> Float[Tensor, "b v"]:
        inputs = {
            name: torch.cat([question[name] for question in questions])
            if isinstance(value, Tensor)
            else value
            for name, value in questions[0].items()
        }
        for name, value in inputs.items():
            if isinstance(value, Tensor):
                dtype = self.network.dtype if value.is_floating_point() else None
                inputs[name] = value.to(self.network.device, dtype)
        text = self.network.config.get_text_config()
        if text.is_encoder_decoder:
            start = inputs["input_ids"].new_full((len(questions), 1), text.decoder_start_token_id)
            inputs["decoder_input_ids"] = start
        for option, setting in (("use_cache", False), ("logits_to_keep", 1)):
            if option in self._forward_takes:
                inputs[option] = setting
        return self.network(**inputs).logits[:, -1].float()


# --------------------------------------------------------------------------------------------
# OCR
# --------------------------------------------------------------------------------------------


@register_reward(
    "ocr",
    modality="image",
    differentiable=False,
    needs_prompt=True,
    range=(0.0, 1.0),
    licence="Apache-2.0",
    weights="PP-OCR, in the package rapidocr",
    source="Liu et al. 2025 (Flow-GRPO), arXiv:2505.05470",
)
class OCR:
    """How much of the text in quotes in the prompt can be read in the image.

    1 if the wanted text is somewhere in what was read, otherwise 1 - d / n, at least 0: d is the
    edit distance between the whole of what was read and the wanted text, n the length of the
    latter. White space and case do not count. Several quoted texts are wanted in their order, one
    after the other. Read by RapidOCR (PP-OCR models in ONNX), one image at a time, on the CPU by
    default. An image in which it finds no text scores 0; if it fails, so does the call.

    Args:
        target: the wanted text, for all images; by default what stands in double quotes in each
            prompt.
        params: settings of RapidOCR such as ``{"Global.text_score": 0.3}`` (the confidence below
            which text is ignored; 0.5 by default).

    Raises:
        ImportError: rapidocr or onnxruntime is not installed.
        ValueError: no text is wanted: an empty ``target``, or (when called) a prompt without
            quoted text.
    """

    def __init__(self, target: str | None = None, params: Mapping[str, Any] | None = None) -> None:
        if target is not None and not _plain(target):
            raise ValueError(f"the target must have letters to read, but {target!r} came")
        self.target = target
        self._engine = _rapidocr({"Global.log_level": "critical", **(params or {})})
        self.info = replace(type(self).info, needs_prompt=target is None)

    def __call__(self, samples: Samples) -> Scores:
        if self.target is not None:
            targets = [self.target] * len(samples)
        else:
            targets = [quoted(prompt) for prompt in samples.prompts]
        pictures = _pictures(samples.data)
        found = [found_text(t, self.read(p)) for t, p in zip(targets, pictures, strict=True)]
        return Scores(torch.tensor(found, dtype=torch.float32, device=samples.data.device))

    def read(self, picture: Image.Image) -> str:
        """All text in the picture, line by line."""
        return "\n".join(self._engine(picture).txts or ())


def _rapidocr(params: Mapping[str, Any]):
    try:
        import onnxruntime  # noqa: F401  (rapidocr would miss it only when it reads)
        from rapidocr import RapidOCR
    except ImportError as err:
        raise ImportError(
            f"reward 'ocr' needs rapidocr and onnxruntime ({err}); pip install \"diffreward[ocr]\""
        ) from err
    return RapidOCR(params=dict(params))


def quoted(prompt: str) -> str:
    """What stands in double quotes, straight or curly, one after the other.

    Raises:
        ValueError: nothing does.
    """
    texts = ["".join(pair) for pair in re.findall(r'"([^"]*)"|“([^”]*)”', prompt)]
    if not _plain("".join(texts)):
        raise ValueError(
            f"reward 'ocr' looks for the text in double quotes, but there is none in {prompt!r}; "
            "quote it, or set target="
        )
    return " ".join(texts)


def found_text(wanted: str, read: str) -> float:
    """1 if the wanted text is in what was read, otherwise 1 - distance / length, at least 0."""
    wanted, read = _plain(wanted), _plain(read)
    if wanted in read:
        return 1.0
    return max(0.0, 1 - edit_distance(wanted, read) / len(wanted))


def _plain(text: str) -> str:
    return re.sub(r"\s", "", text).lower()


def edit_distance(a: str, b: str) -> int:
    """Levenshtein distance: fewest insertions, deletions and replacements of one character."""
    row = list(range(len(b) + 1))  # distances of the first i characters of a to each start of b
    for i, left in enumerate(a, 1):
        diagonal, row[0] = row[0], i
        for j, right in enumerate(b, 1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (left != right))
    return row[-1]
