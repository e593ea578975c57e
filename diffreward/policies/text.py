"""Masked diffusion of text: a masked language model of transformers as the denoiser.

Token ids are the tokenizer's, 0..v-1 with v the network's vocabulary; the chain's MASK = v is the
tokenizer's mask token at the network's input. No special token and no id without a token is ever
sampled. All rows have ``max_length`` tokens, padded on the right behind an attention mask, so that
prompts of different lengths share a batch and no text depends on its neighbours.

Models that were trained as masked diffusion (MDLM, Sahoo et al. 2024, arXiv:2406.07524) know every
fraction of masks. BERT, RoBERTa or ModernBERT learnt to fill in 15 to 30 % of a text: they are good
at that, and poor at writing one from nothing.
"""

from __future__ import annotations

import copy
import inspect
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from diffreward.policies.lora import load_lora
from diffreward.policies.masked import SCHEDULES, MaskedPolicy
from diffreward.policy import Condition
from diffreward.samples import Samples

UNUSED = re.compile(r"\[unused\d+\]|<unused\d+>|madeupword\d+|<madeupword\d+>")
"""Tokens that vocabularies keep free."""

ATTENTION = (
    "query", "key", "value", "q_proj", "k_proj", "v_proj", "q_lin", "k_lin", "v_lin", "Wqkv",
    "attn_qkv",
)  # fmt: skip
"""What attention projections are called in BERT's kin, DistilBERT, ModernBERT and MDLM."""

EPS = 1e-3  #: MDLM's: its alpha is 1 - (1 - eps) m, m the fraction of masks


class TextPolicy(MaskedPolicy):
    """A masked language model as a masked diffusion policy.

    A prompt is a text with blanks, written as the tokenizer's mask token: ``"A [MASK][MASK] dog."``
    or, for the same, ``"A [MASK]*2 dog."``. A prompt without blanks is continued by ``length`` of
    them; the empty one is a text of ``length`` tokens from nothing. One blank is one token.

    Networks whose ``forward`` has ``timesteps``, as MDLM's on the hub, are given its sigma,
    -log(1 - (1 - eps) m). (Tested with a stand-in of that signature; the published files have not
    been run. Their code needs flash-attn, and was written for an older transformers.)

    Args:
        denoiser: a ``...ForMaskedLM``; it is put into eval mode.
        tokenizer: its tokenizer. If that has no mask token and the network one id more than it,
            that id is ``[MASK]``, as in MDLM.
        length: blanks that are added to prompts without any; None: such prompts are refused, or,
            if the network takes no attention mask, continued up to ``max_length``.
        max_length: tokens of every row, prompt and special ones included; None: 64, or as many as
            the network reads. Memory and time grow with it, whatever the prompts' lengths.
        omit: tokens that are never sampled, besides special ones.
        options: of `MaskedPolicy`.

    Raises:
        ValueError: no mask token, a tokenizer of another network, a token to omit that does not
            exist, or a number or option out of range.
    """

    lora_targets = ATTENTION

    def __init__(
        self,
        denoiser: nn.Module,
        tokenizer: Any,
        *,
        length: int | None = None,
        max_length: int | None = None,
        omit: Sequence[str] = (),
        **options,
    ) -> None:
        vocabulary = denoiser.config.vocab_size
        super().__init__(denoiser.eval(), vocabulary, "text", **options)
        name = type(denoiser).__name__
        if tokenizer.mask_token_id is None and vocabulary == len(tokenizer) + 1:
            tokenizer = copy.deepcopy(tokenizer)
            tokenizer.add_special_tokens({"mask_token": "[MASK]"})
        if tokenizer.mask_token_id is None:
            raise ValueError(
                f"the tokenizer of this {name} has no mask token, which blanks are written with; "
                "is it a masked language model? If so, set tokenizer.mask_token"
            )
        tokens = tokenizer.get_vocab()
        if max(tokens.values()) >= vocabulary:
            raise ValueError(
                f"the tokenizer has ids up to {max(tokens.values())}, but this {name} knows "
                f"{vocabulary} tokens; give the tokenizer that it was trained with"
            )
        self.tokenizer = tokenizer
        self.length = None if length is None else _positive("length", length)
        self.most_tokens = _most_tokens(denoiser, tokenizer)
        if max_length is None:
            max_length = min(64, self.most_tokens or 64)
        self.max_length = max_length
        if not 1 <= max_length <= (self.most_tokens or max_length):
            raise ValueError(
                f"this {name} reads 1 to {self.most_tokens} tokens, but max_length={max_length} "
                "came"
            )
        self._inputs = inspect.signature(denoiser.forward).parameters
        self.time_independent = "timesteps" not in self._inputs or not getattr(
            denoiser.config, "time_conditioning", True
        )
        names = ("pad", "cls", "sep", "bos", "eos", "mask")
        self._silent = {getattr(tokenizer, f"{name}_token_id") for name in names}
        # where there is no padding token the attention mask hides whichever stands for it
        self._pad = tokenizer.pad_token_id or 0
        self._never = torch.ones(vocabulary, dtype=torch.bool)
        self._never[[k for token, k in tokens.items() if not UNUSED.fullmatch(token)]] = False
        self._never[tokenizer.all_special_ids] = True
        if self._never.all():  # what transformers makes where it finds no file of a tokenizer
            raise ValueError(
                f"the tokenizer of this {name} has nothing but special tokens; is it missing? Give "
                "the place of one that save_pretrained wrote (load_text(..., tokenizer=...))"
            )
        omit = [omit] if isinstance(omit, str) else omit
        if unknown := [token for token in omit if token not in tokens]:
            raise ValueError(
                f"omit: {unknown[0]!r} is no token of this tokenizer; its tokens are as in "
                f"{tokenizer.tokenize('an example')}"
            )
        self._never[[tokens[token] for token in omit]] = True
        if self._never.all():
            raise ValueError("omit leaves no token that could be sampled")
        self._relaxes = self._takes_embeddings()

    def latent_shape(self, condition: Condition) -> tuple[int, ...]:
        return (self.max_length,)

    def encode(self, prompts: Sequence[str], *, length: int | None = None) -> Condition:
        """Tokenize prompts; their tokens stay, the blanks are sampled.

        Args:
            prompts: texts with blanks, or to be continued; see the class.
            length: in place of the policy's.

        Raises:
            ValueError: a prompt without blanks and no ``length``, one with too many tokens, or
                one with fewer than ``max_length`` for a network without attention mask.
        """
        length = self.length if length is None else _positive("length", length)
        rows = [self._tokenize(prompt, i, length) for i, prompt in enumerate(prompts)]
        lengths = torch.tensor([len(row) for row in rows])
        there = torch.arange(self.max_length) < lengths[:, None]
        ids = torch.full(there.shape, self._pad)
        ids[there] = torch.tensor([k for row in rows for k in row])
        fixed = ids.masked_fill(there & (ids == self.tokenizer.mask_token_id), -1)
        tensors = {"fixed": fixed, "attention": there}
        return Condition(list(prompts), {k: t.to(self.device) for k, t in tensors.items()})

    def logits(
        self, x: Tensor, t: Float[Tensor, " b"], condition: Condition
    ) -> Float[Tensor, "b l v"]:
        """As in `MaskedPolicy`; -inf for tokens that are never sampled, where none is fixed.

        Raises:
            ValueError: a relaxed state, of a network whose embeddings cannot be given to it.
        """
        there, fixed = (condition.tensors[k].to(self.device) for k in ("attention", "fixed"))
        logits = self._forward(x, t, there)
        return logits.masked_fill(self._never.to(self.device) & (fixed < 0)[..., None], -torch.inf)

    def decode(self, x0: Tensor, condition: Condition) -> Samples:
        """Texts, with their prompts' words and without special tokens.

        Of relaxed ``x0`` the likeliest tokens; there is no gradient to the reward of a text.

        Raises:
            ValueError: a token is MASK.
        """
        tokens = super().decode(x0, condition).data
        tokens = tokens.argmax(-1) if tokens.is_floating_point() else tokens
        there = condition.tensors["attention"].to(tokens.device)
        texts = [
            self.tokenizer.decode([k for k in row[some].tolist() if k not in self._silent])
            for row, some in zip(tokens, there, strict=True)
        ]
        return Samples(texts, "text", list(condition.prompts))

    # Pieces

    def _forward(self, x: Tensor, t: Tensor, there: Tensor) -> Tensor:
        inputs: dict[str, Tensor] = {}
        if x.is_floating_point():
            if not self._relaxes:
                raise ValueError(
                    f"{type(self.denoiser).__name__} cannot take relaxed tokens: its forward has "
                    "no inputs_embeds, or they do not give what input_ids do. DRAKES and "
                    "proposal='gradient' need them; GRPO, PRDP and proposal='policy' do not"
                )
            # the layer itself, not its weights: it may have adapters
            every = torch.arange(self.vocabulary + 1, device=x.device)
            inputs["inputs_embeds"] = x @ self._embed(self._ids(every))
        else:
            inputs["input_ids"] = self._ids(x)
        if "attention_mask" in self._inputs:
            inputs["attention_mask"] = there.long()
        if "timesteps" in self._inputs:
            m = SCHEDULES[self.schedule][0](t)
            inputs["timesteps"] = -torch.log1p(-(1 - EPS) * m)
        found = self.denoiser(**inputs)
        return getattr(found, "logits", found)[..., : self.vocabulary]

    def _ids(self, x: Tensor) -> Tensor:
        return x.masked_fill(x == self.mask, self.tokenizer.mask_token_id)

    def _embed(self, ids: Tensor) -> Tensor:
        return self.denoiser.get_input_embeddings()(ids)

    def _takes_embeddings(self) -> bool:
        """Whether the network makes the same of embeddings as of the tokens that they are of.

        ESM's does not: it counts masks among its tokens, and rescales the others.
        """
        if "inputs_embeds" not in self._inputs:
            return False
        x = (~self._never).nonzero()[:3, 0].tolist()
        x = torch.tensor([[*x, self.mask][-self.max_length :]], device=self.device)
        there, t = torch.ones_like(x, dtype=torch.bool), torch.ones(1, device=self.device)
        self._relaxes = True
        try:
            with torch.no_grad():
                soft = self._forward(self.relax(x).to(self.dtype), t, there)
                return torch.allclose(soft, self._forward(x, t, there), rtol=1e-3, atol=1e-3)
        except NotImplementedError:  # transformers', where it does not find the embeddings
            return False

    def _tokenize(self, prompt: str, i: int, length: int | None) -> list[int]:
        mask, name = self.tokenizer.mask_token, type(self.denoiser).__name__
        text = re.sub(
            re.escape(mask) + r"\*(\d+)", lambda found: mask * int(found[1]), prompt.strip()
        )
        padded = "attention_mask" in self._inputs
        if mask not in text:
            if length is None and not padded:
                length = self.max_length - len(self._tokens(text))
            elif length is None:
                raise ValueError(
                    f"prompt {i} ({_short(prompt)}) has no blanks: write {mask} where a token is "
                    f"to be filled in ({mask}*8 for eight), or give length, how many are to follow"
                )
            text += mask * length
        ids = self._tokens(text)
        if len(ids) > self.max_length:
            most = f"; the network reads {self.most_tokens}" if self.most_tokens else ""
            raise ValueError(
                f"prompt {i} ({_short(prompt)}) has {len(ids)} tokens with its blanks and special "
                f"tokens, but max_length is {self.max_length}: raise it, or shorten the prompt or "
                f"length{most}"
            )
        if len(ids) < self.max_length and not padded:
            raise ValueError(
                f"prompt {i} ({_short(prompt)}) has {len(ids)} tokens, and {name} takes no "
                f"attention mask: every text must fill max_length={self.max_length}. Leave length "
                "out for prompts to be continued so far, or set max_length to this number"
            )
        if self.tokenizer.mask_token_id not in ids:
            raise ValueError(f"prompt {i} ({_short(prompt)}) has no blanks")
        return ids

    def _tokens(self, text: str) -> list[int]:
        return self.tokenizer(text, verbose=False)["input_ids"]


def load_text(
    spec: str | os.PathLike,
    *,
    num_steps: int = 64,
    length: int | None = None,
    max_length: int | None = None,
    omit: Sequence[str] = (),
    tokenizer: str | os.PathLike | None = None,
    lora: str | os.PathLike | None = None,
    trust_remote_code: bool = False,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
    **options,
) -> TextPolicy:
    """The policy of a masked language model.

    Args:
        spec: a folder that ``save_pretrained`` wrote, or a hub id, for ``AutoModelForMaskedLM``.
        num_steps: steps of the chain; more of them fill in fewer tokens at once.
        length, max_length, omit: of `TextPolicy`.
        tokenizer: folder or hub id; None: ``spec``. (MDLM's is "gpt2".)
        lora: folder of a LoRA that finetuning saved, which is added to the weights.
        trust_remote_code: run code that comes with the model.
        device: None: a GPU if there is one.
        dtype: of the network.
        options: of `MaskedPolicy` (schedule, temperature, top_p, relaxation, tau, remasking).

    Raises:
        FileNotFoundError: no such folder, a file is missing from it, or an id is neither cached nor
            reachable.
        ValueError: no masked language model with its tokenizer, or an option is out of range.
    """
    from transformers import AutoModelForMaskedLM, AutoTokenizer

    name, words = (_place(v) for v in (spec, spec if tokenizer is None else tokenizer))
    loading = {"trust_remote_code": trust_remote_code}
    try:
        tokens = AutoTokenizer.from_pretrained(words, **loading)
        network, found = AutoModelForMaskedLM.from_pretrained(
            name, dtype=dtype, output_loading_info=True, **loading
        )
    except OSError as err:
        raise FileNotFoundError(
            f"{os.fspath(spec)!r} lacks files, or is no folder here and could not be had from the "
            f"hub ({' '.join(str(err).split())}); give what save_pretrained wrote, network and "
            "tokenizer (or the tokenizer's own place as tokenizer=...)"
        ) from err
    if missing := sorted(found["missing_keys"]):
        raise ValueError(
            f"{os.fspath(spec)!r} has no weights for {', '.join(missing[:3])}"
            f"{', ...' if len(missing) > 3 else ''}: they would be random. Is it a masked language "
            "model, with its head?"
        )
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    policy = TextPolicy(
        network.to(device), tokens,
        length=length, max_length=max_length, omit=omit, num_steps=num_steps, **options,
    )  # fmt: skip
    if lora is not None:
        load_lora(policy, lora, fuse=True)
    return policy


def _place(spec: str | os.PathLike) -> str:
    """A folder's path, or a hub id."""
    path = Path(spec).expanduser()
    if path.is_dir():
        return str(path)
    if re.fullmatch(r"(?:[\w-][\w.-]*/)?[\w-][\w.-]*", os.fspath(spec)) is None:
        raise FileNotFoundError(f"there is no folder {path}; on the hub it would be owner/name")
    return os.fspath(spec)


def _most_tokens(network: nn.Module, tokenizer: Any) -> int | None:
    """How many tokens fit, or None if nothing says so."""
    limits = [getattr(network.config, "model_length", None)]  # MDLM's name for it
    if tokenizer.model_max_length < 10**9:  # otherwise transformers' word for "unknown"
        limits.append(tokenizer.model_max_length)
    if positions := getattr(network.config, "max_position_embeddings", None):
        # RoBERTa numbers positions from its padding index + 1
        tables = [m for m in network.modules() if isinstance(m, nn.Embedding)]
        used = [m.padding_idx for m in tables if m.num_embeddings == positions]
        limits.append(positions - max((i + 1 for i in used if i is not None), default=0))
    return min((n for n in limits if n is not None), default=None)


def _positive(name: str, value: int) -> int:
    if value < 1:
        raise ValueError(f"{name} must be 1 or more, but {value} came")
    return value


def _short(prompt: str) -> str:
    return repr(prompt if len(prompt) <= 40 else prompt[:37] + "...")
