"""Rewards for text, by any transformers model from the hub or a folder.

``text_similarity`` compares a text with another, ``classifier`` asks a sequence classifier,
``perplexity`` a causal language model. Samples are strings, so that there is no gradient. The
networks are frozen, in eval mode and float32; code from the hub is never run. Texts are scored in
chunks of similar length; a score does not depend on its neighbours.
"""

import difflib
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from diffreward.rewards.base import RewardInfo, Scores, register_reward
from diffreward.samples import Samples

_ENTRY = dict(modality="text", differentiable=False, licence="that of the weights")
_CACHE_SIZE = 4096  # prompts

# --------------------------------------------------------------------------------------------
# Loading and batching
# --------------------------------------------------------------------------------------------


class _TextNetwork:
    """A pretrained network and its tokenizer.

    Args:
        kind: transformers' class, such as ``"AutoModel"``.
        model: a folder saved by ``save_pretrained`` (network and tokenizer), or a hub id.
        max_length: tokens read at once; None: as many as the network can.
        chunk_size: texts given to the network at once.
        device: None: CUDA if there is one, else the CPU.
        optional: weights with these prefixes may be missing.

    Raises:
        FileNotFoundError: there is no such folder, and it could not be had from the hub.
        ValueError: the checkpoint lacks weights, so that some would be random; or a number out
            of range.
    """

    def __init__(
        self,
        kind: str,
        model: str,
        max_length: int | None,
        chunk_size: int,
        device: str | None,
        optional: tuple[str, ...] = (),
    ) -> None:
        if chunk_size < 1:
            raise ValueError(f"chunk_size must be at least 1, but {chunk_size} came")
        network, self.tokenizer = _load(kind, model, optional)
        chosen = device or ("cuda" if torch.cuda.is_available() else "cpu")
        self.network = network.requires_grad_(False).eval().to(chosen)
        self.model, self.chunk_size = model, chunk_size
        limit = _most_tokens(self.network, self.tokenizer)
        if max_length is not None and not 2 <= max_length <= (limit or max_length):
            raise ValueError(f"{model} reads 2 to {limit} tokens, but max_length={max_length} came")
        self.max_length = max_length or limit
        config = self.network.config
        ids = (self.tokenizer.pad_token_id, config.pad_token_id, self.tokenizer.eos_token_id, 0)
        self.padding = next(i for i in ids if i is not None)
        if config.pad_token_id is None:  # a decoder's classifier finds the last token by it
            config.pad_token_id = self.padding

    @property
    def device(self) -> torch.device:
        return self.network.device

    def tokenize(self, texts: Sequence[str], who: str) -> list[list[int]]:
        """Token ids with the model's special tokens; a text that is too long is cut, and warned of.

        Raises:
            ValueError: a text without any token; the message names it.
        """
        rows = self.tokenizer(list(texts), verbose=False)["input_ids"]
        for i, row in enumerate(rows):
            if not row:
                raise ValueError(f"reward {who!r}: sample {i} ({texts[i]!r}) has no tokens")
            if self.max_length is not None and len(row) > self.max_length:
                warnings.warn(
                    f"reward {who!r} reads only the first {self.max_length} of {len(row)} tokens "
                    f"of sample {i} ({texts[i][:40]!r}...)",
                    stacklevel=2,
                )
                cut = self.tokenizer(texts[i], truncation=True, max_length=self.max_length)
                rows[i] = cut["input_ids"]
        return rows

    def batches(
        self, rows: Sequence[Sequence[int]]
    ) -> Iterator[tuple[list[int], Int[Tensor, "c l"], Bool[Tensor, "c l"]]]:
        """Which rows, their ids, and where these are no padding (on the right); longest first."""
        order = sorted(range(len(rows)), key=lambda i: -len(rows[i]))
        for start in range(0, len(rows), self.chunk_size):
            which = order[start : start + self.chunk_size]
            lengths = torch.tensor([len(rows[i]) for i in which])
            there = torch.arange(int(lengths[0])) < lengths[:, None]
            ids = torch.full(there.shape, self.padding)
            ids[there] = torch.tensor([token for i in which for token in rows[i]])
            yield which, ids.to(self.device), there.to(self.device)

    def to(self, device: torch.device | str) -> None:
        # Not in the caller's inference mode: the weights must stay ordinary tensors.
        with torch.inference_mode(False):
            self.network.to(device)


def _load(kind: str, model: str, optional: tuple[str, ...]) -> tuple[nn.Module, Any]:
    import transformers

    path = Path(model).expanduser()
    local = path.is_dir()
    if not local and (model.count("/") > 1 or model.startswith((".", "/", "~"))):
        raise FileNotFoundError(f"there is no folder {path}; on the hub it would be ORG/NAME")
    name = str(path) if local else model
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(name, trust_remote_code=False)
        network, found = getattr(transformers, kind).from_pretrained(
            name, dtype=torch.float32, trust_remote_code=False, output_loading_info=True
        )
    except OSError as err:
        what = "lacks files" if local else "is no folder here and could not be had from the hub"
        raise FileNotFoundError(
            f"{model!r} {what} ({' '.join(str(err).split())}); give a folder written by "
            "save_pretrained, network and tokenizer"
        ) from err
    missing = sorted(key for key in found["missing_keys"] if not key.startswith(optional))
    if missing:
        raise ValueError(
            f"{model!r} has no weights for {', '.join(missing[:3])}"
            f"{', ...' if len(missing) > 3 else ''}: they would be random. Is it a checkpoint for "
            f"transformers' {kind}?"
        )
    return network, tokenizer


def _most_tokens(network: nn.Module, tokenizer: Any) -> int | None:
    """How many tokens fit, or None if nothing says so."""
    limits = []
    if tokenizer.model_max_length < 10**9:  # otherwise transformers' word for "unknown"
        limits.append(tokenizer.model_max_length)
    if positions := getattr(network.config, "max_position_embeddings", None):
        # RoBERTa numbers positions from its padding index + 1.
        tables = [m for m in network.modules() if isinstance(m, nn.Embedding)]
        used = [m.padding_idx for m in tables if m.num_embeddings == positions]
        limits.append(positions - max((i + 1 for i in used if i is not None), default=0))
    return min(limits, default=None)


# --------------------------------------------------------------------------------------------
# Similarity
# --------------------------------------------------------------------------------------------


@register_reward(
    "text_similarity",
    needs_prompt=True,
    range=(-1.0, 1.0),
    weights="a sentence encoder, by default sentence-transformers/all-MiniLM-L6-v2",
    source="Reimers & Gurevych 2019 (Sentence-BERT), arXiv:1908.10084",
    **_ENTRY,
)
class TextSimilarity:
    """Cosine of the sentence embeddings of the text and its prompt, or of one reference text.

    The embedding is the mean of the last hidden states over all tokens, special ones included, as
    in sentence-transformers, or the first token's.

    Args:
        reference: compare with this text; by default each sample with its prompt.
        model: an encoder: a folder saved by ``save_pretrained``, or a hub id.
        pooling: ``"mean"`` or ``"cls"``, whichever the encoder was trained with.
        max_length: tokens read of a text; by default as many as the network can.
            (sentence-transformers reads 256 with all-MiniLM-L6-v2.)
        chunk_size: texts given to the network at once.
        device: by default CUDA if there is one, else the CPU.

    Raises:
        FileNotFoundError: there is no such folder, and it could not be had from the hub.
        ValueError: the checkpoint lacks weights, an unknown pooling, a number out of range; when
            called, a text without any token.
    """

    def __init__(
        self,
        reference: str | None = None,
        model: str = "sentence-transformers/all-MiniLM-L6-v2",
        pooling: str = "mean",
        max_length: int | None = None,
        chunk_size: int = 64,
        device: str | None = None,
    ) -> None:
        if pooling not in ("mean", "cls"):
            raise ValueError(f"pooling is mean or cls, but {pooling!r} came")
        # Sentence encoders come without the pooler, which is not read.
        self.encoder = _TextNetwork("AutoModel", model, max_length, chunk_size, device, ("pooler",))
        self.reference, self.pooling = reference, pooling
        entry = type(self).info
        to = "the prompt" if reference is None else repr(reference)
        self.info = RewardInfo(
            entry.name,
            needs_prompt=reference is None,
            range=entry.range,
            weights=model,
            source=entry.source,
            description=f"cosine of sentence embeddings with {to}, {model}",
            **_ENTRY,
        )
        self._known: dict[str, Tensor] = {}

    def __call__(self, samples: Samples) -> Scores:
        others = samples.prompts if self.reference is None else [self.reference]
        return Scores((self.features(samples.data) * self._remembered(others)).sum(dim=-1))

    def features(self, texts: Sequence[str]) -> Float[Tensor, "b d"]:
        """Unit-norm embeddings."""
        rows = self.encoder.tokenize(texts, self.info.name)
        features: list[Tensor] = [torch.empty(0)] * len(rows)
        with torch.no_grad():
            for which, ids, there in self.encoder.batches(rows):
                hidden = self.encoder.network(ids, attention_mask=there.long()).last_hidden_state
                if self.pooling == "cls":
                    pooled = hidden[:, 0]
                else:
                    pooled = (hidden * there[..., None]).sum(1) / there.sum(1, keepdim=True)
                for i, feature in zip(which, F.normalize(pooled, dim=-1), strict=True):
                    features[i] = feature
        return torch.stack(features)

    def _remembered(self, texts: Sequence[str]) -> Float[Tensor, "b d"]:
        new = [text for text in dict.fromkeys(texts) if text not in self._known]
        known = dict(self._known)
        if new:
            known.update(zip(new, self.features(new), strict=True))
        self._known = dict(list(known.items())[-_CACHE_SIZE:])
        return torch.stack([known[text] for text in texts])

    def to(self, device: torch.device | str) -> "TextSimilarity":
        """Move the network."""
        self.encoder.to(device)
        self._known.clear()
        return self


# --------------------------------------------------------------------------------------------
# Classification
# --------------------------------------------------------------------------------------------

_OUTPUTS = {
    "probability": (torch.sigmoid, (0.0, 1.0)),
    "log_probability": (F.logsigmoid, (-float("inf"), 0.0)),
    "logit": (lambda z: z, (-float("inf"), float("inf"))),
}


@register_reward(
    "classifier",
    range=(0.0, 1.0),
    weights="a transformers sequence classifier, to be named",
    source="the classifier's own",
    **_ENTRY,
)
class Classifier:
    """Probability of a label, by any sequence classifier of transformers.

    Not toxic: ``{name: classifier, model: unitary/toxic-bert, label: toxic, avoid: true}``.
    Grammatical: ``{name: classifier, model: textattack/roberta-base-CoLA, label: LABEL_1}``.

    Args:
        model: a folder saved by ``save_pretrained``, or a hub id.
        label: its name in the model's config, or its number.
        output: ``"probability"``; ``"log_probability"``; or ``"logit"``, the log-odds,
            log p / (1 - p), which do not saturate.
        avoid: score that the label does *not* hold: 1 - p, log(1 - p), or minus the log-odds.
        multi_label: each label has a probability of its own (sigmoid), rather than one share of 1
            (softmax); by default what the config's ``problem_type`` says. With a single output
            it is the label's log-odds.
        max_length: tokens read of a text; by default as many as the network can.
        chunk_size: texts given to the network at once.
        device: by default CUDA if there is one, else the CPU.

    Raises:
        FileNotFoundError: there is no such folder, and it could not be had from the hub.
        ValueError: the checkpoint lacks weights (a head that was never trained), an unknown label
            or output, a regression asked for a probability, a number out of range; when called,
            a text without any token.
    """

    def __init__(
        self,
        model: str,
        label: str | int,
        output: str = "probability",
        avoid: bool = False,
        multi_label: bool | None = None,
        max_length: int | None = None,
        chunk_size: int = 64,
        device: str | None = None,
    ) -> None:
        if output not in _OUTPUTS:
            raise ValueError(f"output is one of {', '.join(_OUTPUTS)}, but {output!r} came")
        self.judge = _TextNetwork(
            "AutoModelForSequenceClassification", model, max_length, chunk_size, device
        )
        config = self.judge.network.config
        self.label = _label(label, config.id2label, model)
        problem = getattr(config, "problem_type", None)
        if multi_label is None:
            multi_label = problem == "multi_label_classification"
        if problem == "regression" and output != "logit":
            raise ValueError(f"{model} is a regression and has no {output}; ask for output='logit'")
        self.alone = multi_label or config.num_labels == 1
        self.output, self.avoid = output, avoid
        entry, name = type(self).info, config.id2label[self.label]
        self.info = RewardInfo(
            entry.name,
            range=_OUTPUTS[output][1],
            weights=model,
            source=entry.source,
            description=f"{output} of {'not ' if avoid else ''}{name}, {model}",
            **_ENTRY,
        )

    def __call__(self, samples: Samples) -> Scores:
        rows = self.judge.tokenize(samples.data, self.info.name)
        odds = torch.empty(len(rows), device=self.judge.device)
        with torch.no_grad():
            for which, ids, there in self.judge.batches(rows):
                logits = self.judge.network(ids, attention_mask=there.long()).logits
                z = logits[:, self.label]
                if not self.alone:  # log p / (1 - p) of a softmax
                    others = [i for i in range(logits.shape[1]) if i != self.label]
                    z = z - logits[:, others].logsumexp(dim=1)
                odds[which] = z
        function = _OUTPUTS[self.output][0]
        return Scores(function(-odds if self.avoid else odds))

    def to(self, device: torch.device | str) -> "Classifier":
        """Move the network."""
        self.judge.to(device)
        return self


def _label(label: str | int, names: dict[int, str], model: str) -> int:
    """The number of a label; case makes no difference in its name."""
    if isinstance(label, int) and not isinstance(label, bool) and label in names:
        return label
    found = [i for i, name in names.items() if name.casefold() == str(label).casefold()]
    if len(found) == 1:
        return found[0]
    near = difflib.get_close_matches(str(label), names.values(), n=1)
    raise ValueError(
        f"{model} has no label {label!r}"
        + (f" (did you mean {near[0]!r}?)" if near else "")
        + f"; it has {', '.join(f'{i} {name}' for i, name in names.items())}"
    )


# --------------------------------------------------------------------------------------------
# Perplexity
# --------------------------------------------------------------------------------------------


@register_reward(
    "perplexity",
    range=(-float("inf"), 0.0),
    weights="a causal language model, by default openai-community/gpt2",
    source="Jelinek et al. 1977, Perplexity, a measure of the difficulty of speech recognition",
    **_ENTRY,
)
class Perplexity:
    """Minus the log of the perplexity: the mean log-likelihood in nats per token, at most 0.

    Higher is better: the likelier, the nearer to 0. The perplexity itself, exp(-value), lower is
    better, is among the parts, with the number of tokens scored.

    The whole text counts. Where the tokenizer has a beginning-of-sequence token, the text follows
    one, so that its first token is scored too; otherwise that one only serves as context. No end
    of sequence is scored. A text longer than ``max_length`` is read in windows that start every
    ``stride`` tokens; each token is scored once, in the first window that has it, after at least
    ``max_length - stride`` others (fewer at the start of the text).

    Args:
        model: a folder saved by ``save_pretrained``, or a hub id.
        max_length: tokens read at once; by default as many as the network can, at most 1024.
        stride: tokens from one window to the next, below ``max_length``; by default half of it.
            Smaller gives more context, at more cost.
        bos: put the beginning-of-sequence token first, if the tokenizer has one.
        chunk_size: windows given to the network at once.
        device: by default CUDA if there is one, else the CPU.

    Raises:
        FileNotFoundError: there is no such folder, and it could not be had from the hub.
        ValueError: the checkpoint lacks weights, or a number is out of range; when called, a text
            with nothing to score: none, or a single token without one before it.
    """

    def __init__(
        self,
        model: str = "openai-community/gpt2",
        max_length: int | None = None,
        stride: int | None = None,
        bos: bool = True,
        chunk_size: int = 8,
        device: str | None = None,
    ) -> None:
        self.judge = _TextNetwork("AutoModelForCausalLM", model, max_length, chunk_size, device)
        self.length = max_length or min(self.judge.max_length or 1024, 1024)
        self.stride = self.length // 2 if stride is None else stride
        if not 1 <= self.stride < self.length:
            raise ValueError(
                f"stride must be from 1 to {self.length - 1} (below max_length), but {stride} came"
            )
        self.bos = self.judge.tokenizer.bos_token_id if bos else None
        entry = type(self).info
        self.info = RewardInfo(
            entry.name,
            range=entry.range,
            weights=model,
            source=entry.source,
            description=f"mean log-likelihood, nats per token, {model}",
            **_ENTRY,
        )

    def __call__(self, samples: Samples) -> Scores:
        texts = self._tokenize(samples.data)
        windows = [
            (i, start, end, first)
            for i, text in enumerate(texts)
            for start, end, first in _windows(len(text), self.length, self.stride)
        ]
        total = torch.zeros(len(texts), dtype=torch.float64)
        rows = [texts[i][start:end] for i, start, end, _ in windows]
        with torch.no_grad():
            for which, ids, there in self.judge.batches(rows):
                logits = self.judge.network(ids, attention_mask=there.long()).logits
                for row, window in enumerate(which):
                    i, start, end, first = windows[window]
                    targets = ids[row, first - start : end - start]
                    predicted = logits[row, first - start - 1 : end - start - 1].float()
                    total[i] -= F.cross_entropy(predicted, targets, reduction="sum").item()
        count = torch.tensor([len(text) - 1 for text in texts], dtype=torch.float64)
        value = total / count
        parts = {"perplexity": (-value).exp(), "tokens": count}
        return Scores(value.float(), None, {name: part.float() for name, part in parts.items()})

    def _tokenize(self, texts: Sequence[str]) -> list[list[int]]:
        tokenizer = self.judge.tokenizer
        rows = tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]
        if self.bos is not None:
            rows = [[self.bos, *row] for row in rows]
        for i, row in enumerate(rows):
            if len(row) < 2:
                alone = self.bos is None and row
                what = "one token, and none before it to predict it" if alone else "no tokens"
                raise ValueError(f"reward {self.info.name!r}: sample {i} ({texts[i]!r}) has {what}")
        return rows

    def to(self, device: torch.device | str) -> "Perplexity":
        """Move the network."""
        self.judge.to(device)
        return self


def _windows(count: int, length: int, stride: int) -> Iterator[tuple[int, int, int]]:
    """(start, end, first): tokens start..end are read, and first..end of them scored."""
    start, first = 0, 1
    while True:
        end = min(start + length, count)
        yield start, end, first
        if end == count:
            return
        start, first = start + stride, end
