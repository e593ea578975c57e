"""``remote``: a reward that a server computes (``diffreward serve``), and the format both speak.

A request to score is a JSON object; all its fields are optional::

    {"rewards": ["toxicity"],       by name; without it, all that are served
     "modality": "text",
     "data": ["a haiku", ...],      text samples
     "prompts": [...],              one for each sample
     "context": {"key": [...]}}     one entry for each sample

Tensors travel in a safetensors file which has that object as JSON in its metadata, under
``request``. The tensor ``images``, ``(b, 3, h, w)``, holds floats in [0, 1] or uint8; those of any
other modality, int64 tokens first of all, are called ``tokens`` or ``data``; ``context.KEY`` are
those of the context. Nothing that is received is executed, and floats arrive as they were sent.

The answer is ``{"scores": {name: {"value": [...], "std": [...], "parts": {part: [...]}}}}``, where
"std" may be null. JSON has no infinity and no NaN: they are the strings "inf" and "-inf", and null.
"""

import difflib
import email.utils
import json
import math
import os
import random
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, fields, replace
from http import client
from typing import Any
from urllib.parse import urlsplit

import safetensors
import torch
from safetensors.torch import load, save
from torch import Tensor

from diffreward.rewards.base import RewardInfo, Scores, register_reward
from diffreward.samples import Samples

# --------------------------------------------------------------------------------------------
# The format
# --------------------------------------------------------------------------------------------

JSON = "application/json"
SAFETENSORS = "application/octet-stream"
_FIELDS = ("rewards", "modality", "data", "prompts", "context")
_TENSORS = ("images", "tokens", "data")


def pack(samples: Samples, rewards: Sequence[str]) -> tuple[str, bytes]:
    """The content type and the body of a request that asks rewards to score samples.

    Raises:
        TypeError: the context holds something that neither a tensor nor JSON can say.
    """
    request = {"rewards": list(rewards), "modality": samples.modality, "context": {}}
    if samples.prompts is not None:
        request["prompts"] = samples.prompts
    tensors = {}
    if isinstance(samples.data, Tensor):
        tensors["images" if samples.modality == "image" else "data"] = samples.data
    else:
        request["data"] = list(samples.data)
    for key, value in samples.context.items():
        if isinstance(value, Tensor):
            tensors[f"context.{key}"] = value
        else:
            request["context"][key] = value
    try:
        text = json.dumps(request)
    except TypeError as err:
        raise TypeError(
            f"the context of these samples cannot be sent: {err}; it may hold tensors (b, ...) "
            "and lists of what JSON knows"
        ) from err
    if not tensors:
        return JSON, text.encode()
    # Cloned, since the format refuses tensors that share memory.
    tensors = {name: tensor.detach().cpu().clone() for name, tensor in tensors.items()}
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    return SAFETENSORS, save(tensors, {"request": text})


def unpack(content_type: str, body: bytes) -> tuple[Samples, list[str] | None]:
    """The samples of a request and the names of the rewards, None for all; see :func:`pack`.

    Raises:
        ValueError: the body is not what the module's docstring says.
    """
    tensors = {}
    if content_type == SAFETENSORS:
        try:
            tensors = load(body)
        except (safetensors.SafetensorError, KeyError, ValueError, RuntimeError) as err:
            raise ValueError(f"the body is not a safetensors file: {err}") from err
        # A file starts with the length of its header; `load` checked it, but has no metadata.
        header = json.loads(body[8 : 8 + int.from_bytes(body[:8], "little")])
        body = (header.get("__metadata__") or {}).get("request", "{}").encode()
        for name, tensor in tensors.items():
            if tensor.is_floating_point() and tensor.element_size() < 2:  # torch cannot compute
                raise ValueError(f"{name!r} is of {tensor.dtype}, which is too short; send float16")
    try:
        request = json.loads(body)
    except (ValueError, RecursionError) as err:
        raise ValueError(f"the request is not JSON: {err}") from err
    if not isinstance(request, dict):
        raise ValueError(f"the request is a JSON object, but a {type(request).__name__} came")
    check_names(request, _FIELDS, "field")

    given = [name for name in _TENSORS if name in tensors] + ["data"] * ("data" in request)
    if len(given) != 1:
        raise ValueError(
            "a request has one of the tensors images, tokens and data, or text in the field "
            f"'data'; there is {' and '.join(given) or 'none of them'}"
        )
    context = request.get("context", {})
    if not isinstance(context, dict) or not all(isinstance(v, list) for v in context.values()):
        raise ValueError("'context' is an object of lists, one entry for each sample")
    if "data" in request:
        data, modality = _strings(request, "data"), request.get("modality", "text")
    else:
        data, modality = tensors.pop(given[0]), request.get("modality")
        if given[0] == "images":
            modality = modality or "image"
            data = data.float() / 255 if data.dtype == torch.uint8 else data
        if not data.numel():
            raise ValueError(f"{given[0]} of shape {tuple(data.shape)} are empty")
    if not isinstance(modality, str):
        raise ValueError(f"'modality' is a name such as \"dna\", but {modality!r} came")
    for name, tensor in tensors.items():
        if not name.startswith("context.") or not tensor.ndim:
            raise ValueError(
                f"there is no use for a tensor {name!r} of shape {tuple(tensor.shape)}; "
                f"there may be one of {', '.join(_TENSORS)}, and context.KEY, (b, ...)"
            )
        context[name.removeprefix("context.")] = tensor
    return Samples(data, modality, _strings(request, "prompts"), context), _strings(
        request, "rewards"
    )


def check_names(given: Iterable[str], known: Sequence[str], what: str) -> None:
    """Refuse a name which nobody would read, with its nearest match.

    Raises:
        ValueError: one of ``given`` is not ``known``.
    """
    for name in given:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(known)}"
            raise ValueError(f"there is no {what} {name!r}; {hint}")


def _strings(request: Mapping[str, Any], field: str) -> list[str] | None:
    value = request.get(field)
    if value is None or (isinstance(value, list) and all(isinstance(v, str) for v in value)):
        return value
    raise ValueError(f"{field!r} is a list of strings, but {str(value)[:80]!r} came")


def scores_to_json(scores: Scores) -> dict[str, Any]:
    """Scores as JSON knows them; every float32 is exact."""

    def numbers(tensor: Tensor) -> list:
        return [_to_json(number) for number in tensor.tolist()]

    return {
        "value": numbers(scores.value),
        "std": None if scores.std is None else numbers(scores.std),
        "parts": {name: numbers(part) for name, part in scores.parts.items()},
    }


def scores_from_json(said: Mapping[str, Any]) -> Scores:
    """Scores from :func:`scores_to_json`, float32 on the CPU."""

    def tensor(numbers: list) -> Tensor:
        return torch.tensor([_from_json(number) for number in numbers], dtype=torch.float32)

    return Scores(
        tensor(said["value"]),
        None if said["std"] is None else tensor(said["std"]),
        {name: tensor(part) for name, part in said["parts"].items()},
    )


def info_to_json(info: RewardInfo) -> dict[str, Any]:
    """What is known about a reward, as JSON knows it."""
    return {**asdict(info), "range": [_to_json(bound) for bound in info.range]}


def info_from_json(said: Mapping[str, Any]) -> RewardInfo:
    """A RewardInfo from :func:`info_to_json`; what a newer server adds is left out."""
    known = {field.name: said[field.name] for field in fields(RewardInfo) if field.name in said}
    known["range"] = tuple(_from_json(bound) for bound in known["range"])
    return RewardInfo(**{**known, "needs_context": tuple(known.get("needs_context", ()))})


def _to_json(number: float | int) -> float | str | None:
    if math.isfinite(number):
        return float(number)
    return None if math.isnan(number) else str(number)


def _from_json(said: float | int | str | None) -> float:
    return math.nan if said is None else float(said)


def read_token(token: str | None) -> str | None:
    """A token, from the environment if it is written ``"env:NAME"``.

    Raises:
        ValueError: the variable is not set, or the token is empty or has blanks or letters
            outside ASCII, which a header cannot carry.
    """
    if token is not None and token.startswith("env:"):
        name = token.removeprefix("env:")
        token = os.environ.get(name)
        if token is None:
            raise ValueError(f"the token is to come from the environment, but {name} is not set")
    if token is not None and not (token.isascii() and token.isprintable() and token.split()):
        raise ValueError("a token is one or more printable ASCII characters; None is for no token")
    return token


# --------------------------------------------------------------------------------------------
# The reward
# --------------------------------------------------------------------------------------------

_FIRST_WAIT, _LONGEST_WAIT = 0.5, 30.0  # seconds, before jitter


@register_reward(
    "remote",
    differentiable=False,
    licence="that of the reward served",
    weights="those of a running server",
    source="this package",
)
def remote(
    url: str,
    reward: str | None = None,
    token: str | None = None,
    timeout: float | int = 300.0,
    retries: int = 5,
) -> "RemoteReward":
    """A reward that a `diffreward serve` computes, here or on another machine.

    Args:
        url: of the server, such as ``"http://127.0.0.1:8000"``.
        reward: which of its rewards, by name; may be left out if there is only one.
        token: its bearer token; ``"env:NAME"`` reads it from the environment, so that it is in no
            configuration.
        timeout: seconds to wait for an answer; a queue's waiting time is part of it.
        retries: how often a request is sent again when the server is busy (429), fails (5xx) or
            cannot be reached.
    """
    return RemoteReward(url, reward, token, timeout, retries)


class RemoteReward:
    """A reward on a server: the same scores, without a gradient.

    Samples are sent in their own precision, in as many requests as the server's limits ask for.
    A request that met a busy, failing or absent server is repeated after 0.5, 1, 2, ... s (at
    most 30 s), each shortened at random by up to half so that clients do not return together,
    and never before the server's ``Retry-After``. What the server refuses is not repeated.
    Redirects are not followed, so that the token goes nowhere else.

    Args:
        url, reward, token, timeout, retries: see :func:`remote`.

    Raises:
        ValueError: an address that is not http(s), no such reward, or one that must be named;
            when called: the server refused the samples.
        PermissionError: the token is missing or wrong.
        ConnectionError: no answer, or only failures, after all retries. Never a score.
    """

    def __init__(
        self,
        url: str,
        reward: str | None = None,
        token: str | None = None,
        timeout: float | int = 300.0,
        retries: int = 5,
    ) -> None:
        address = urlsplit(url)
        if address.scheme not in ("http", "https") or not address.hostname:
            raise ValueError(f"{url!r} is no address such as 'http://127.0.0.1:8000'")
        if retries < 0 or timeout <= 0:
            raise ValueError(f"retries={retries} must be at least 0, and timeout={timeout} above")
        self.url, self.timeout, self.retries = url.rstrip("/"), timeout, retries
        self._token = read_token(token)
        self._random = random.Random()  # its own: the program's random state is not ours to use
        answer = self._call("GET", "/rewards")
        try:
            infos = {said["name"]: info_from_json(said) for said in answer["rewards"]}
            self._max_bytes, self._max_batch = int(answer["max_bytes"]), int(answer["max_batch"])
        except (KeyError, TypeError, ValueError) as err:
            raise ConnectionError(f"{self.url} answers, but not as a reward server does") from err
        if reward is None and len(infos) != 1:
            raise ValueError(f"{self.url} serves {', '.join(infos)}; choose one with reward=")
        chosen = reward or next(iter(infos))
        check_names([chosen], list(infos), f"reward at {self.url} called")
        self.info = replace(infos[chosen], differentiable=False)

    def __call__(self, samples: Samples) -> Scores:
        return Scores.cat([self._score(*request) for request in self._requests(samples)])

    def _requests(self, samples: Samples) -> Iterator[tuple[range, str, bytes]]:
        """Which samples, content type and body of each request, within the server's limits."""
        b, most = len(samples), self._max_batch
        todo = [range(i, min(i + most, b)) for i in range(0, b, most)][::-1]
        while todo:
            indices = todo.pop()
            content_type, body = pack(samples.take(indices), [self.info.name])
            if len(body) <= self._max_bytes:
                yield indices, content_type, body
            elif len(indices) > 1:
                half = len(indices) // 2
                todo += [indices[half:], indices[:half]]
            else:
                raise ValueError(
                    f"sample {indices[0]} takes {len(body)} bytes, but {self.url} reads at most "
                    f"{self._max_bytes}; raise its max_bytes"
                )

    def _score(self, indices: range, content_type: str, body: bytes) -> Scores:
        try:
            answer = self._call("POST", "/score", content_type, body)
        except ValueError as err:  # the server numbers samples from the start of the request
            if indices[0] == 0:
                raise
            these = f"samples {indices[0]} to {indices[-1]}, of which the first is called 0"
            raise ValueError(f"in the request for {these}: {err}") from err
        try:
            scores = scores_from_json(answer["scores"][self.info.name])
        except (KeyError, TypeError, ValueError) as err:
            raise ConnectionError(f"{self.url} gave an answer without scores") from err
        if len(scores) != len(indices):
            raise ConnectionError(f"{self.url} gave {len(scores)} scores to {len(indices)} samples")
        return scores

    def _call(self, method: str, path: str, content_type: str = JSON, body: bytes = b"") -> Any:
        """The answer to a request, repeated while there is hope."""
        for attempt in range(self.retries + 1):
            wait = min(_FIRST_WAIT * 2**attempt, _LONGEST_WAIT) * self._random.uniform(0.5, 1)
            try:
                response, answer = self._send(method, path, content_type, body)
            except (OSError, client.HTTPException) as err:
                problem = f"{type(err).__name__}: {err}"
            else:
                if response.status == 200:
                    try:
                        return json.loads(answer)
                    except ValueError as err:
                        raise ConnectionError(f"{self.url} did not answer in JSON") from err
                problem = f"{response.status} {response.reason}: {_detail(answer)}"
                if response.status in (401, 403):
                    raise PermissionError(f"{self.url} wants the right token=: {problem}")
                if response.status < 500 and response.status not in (408, 429):
                    raise ValueError(f"{self.url} refuses: {problem}")
                asked = _seconds(response.headers.get("Retry-After"))
                wait = max(wait, min(asked, self.timeout))
            if attempt < self.retries:
                time.sleep(wait)
        raise ConnectionError(
            f"no answer from the reward server {self.url} in {self.retries + 1} attempts; "
            f"the last: {problem}"
        )

    def _send(
        self, method: str, path: str, content_type: str, body: bytes
    ) -> tuple[client.HTTPResponse, bytes]:
        address = urlsplit(self.url)
        https = address.scheme == "https"
        connect = client.HTTPSConnection if https else client.HTTPConnection
        connection = connect(address.hostname, address.port, timeout=self.timeout)
        headers = {"Content-Type": content_type}
        if self._token is not None:
            headers["Authorization"] = f"Bearer {self._token}"
        try:
            connection.connect()
            try:
                connection.request(method, address.path + path, body, headers)
            except (BrokenPipeError, ConnectionResetError):
                pass  # a server that refuses may answer, and hang up, before it has read all
            response = connection.getresponse()
            return response, response.read()
        finally:
            connection.close()


def _detail(answer: bytes) -> str:
    try:
        return str(json.loads(answer)["detail"])
    except (ValueError, KeyError, TypeError):
        return answer[:200].decode(errors="replace")


def _seconds(retry_after: str | None) -> float:
    """The header ``Retry-After``, which is a number of seconds or a date; 0 if it is neither."""
    try:
        seconds = float(retry_after or 0)
    except ValueError:
        try:
            seconds = email.utils.parsedate_to_datetime(retry_after).timestamp() - time.time()
        except ValueError:
            return 0.0
    return seconds if seconds > 0 else 0.0
