"""Rewards over HTTP: what ``diffreward serve`` runs and the reward ``remote`` calls.

- ``GET /health``: whether it runs, what it serves, and how long the queue is. Needs no token.
- ``GET /rewards``: what is known about each reward, and the limits of a request.
- ``POST /score``: the scores of one image, sent as it lies on disk (PNG, JPEG, WebP), with
  ``?prompt=...&reward=...`` in the address; or of many samples, in the format of
  :mod:`diffreward.rewards.remote`.

An error is ``{"detail": "..."}``: 400 for a body that cannot be read, 401 without the token, 408
for one that comes too slowly, 413 for one that is too large, 415 for an unknown content type, 422
for samples that a reward refuses, 429 with ``Retry-After`` when the queue is full, 500 for a reward
that fails. A reward that fails is never a score, and one that fails fails the request.

One thread computes, a request at a time, so that the event loop goes on answering. What a client
sends is bounded before it is read, and no code comes with it.
"""

import asyncio
import hmac
import io
import ipaddress
import logging
import math
import time
import warnings
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from diffreward import __version__
from diffreward.rewards.base import Reward, RewardSpec, evaluate, make_reward
from diffreward.rewards.remote import (
    JSON,
    SAFETENSORS,
    check_names,
    info_to_json,
    read_token,
    scores_to_json,
    unpack,
)
from diffreward.rewards.towers import share_towers
from diffreward.samples import Samples
from diffreward.scoring.decode import decode_image, to_float
from diffreward.scoring.planner import label_rewards

_log = logging.getLogger(__name__)
_IMAGES = {"image/png": "PNG", "image/jpeg": "JPEG", "image/webp": "WEBP"}
_UPLOAD_SECONDS = 120.0  # a place in the queue is taken before the body is read


def serve(
    rewards: Sequence[RewardSpec] | Mapping[str, RewardSpec],
    host: str = "127.0.0.1",
    port: int = 8000,
    token: str | None = None,
    **options: Any,
) -> None:
    """Serve rewards over HTTP until interrupted.

    Args:
        rewards: see :func:`create_app`.
        host: address to listen at; the default can be reached from this machine only.
        port: 0 is for any free one.
        token, **options: see :func:`create_app`.

    Raises:
        ImportError, ValueError: see :func:`create_app`.
        SystemExit: the port is taken (uvicorn says so).
    """
    run(create_app(rewards, token=token, **options), host, port, open_to_all=token is None)


def run(app: Any, host: str, port: int, *, open_to_all: bool) -> None:
    """Serve an application of :func:`create_app` until interrupted; see :func:`serve`.

    Raises:
        ValueError: ``port`` cannot be one.
    """
    if not 0 <= port < 65536:
        raise ValueError(f"a port is from 0 to 65535, but {port} came")
    if open_to_all and not _is_loopback(host):
        warnings.warn(
            f"serving at {host} without a token: whoever can reach this machine can use its "
            "rewards and its memory; pass token=, or keep to 127.0.0.1",
            stacklevel=2,
        )
    import uvicorn

    uvicorn.run(app, host=host, port=port)


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def create_app(
    rewards: Sequence[RewardSpec] | Mapping[str, RewardSpec],
    *,
    token: str | None = None,
    max_bytes: int = 64 * 2**20,
    max_queue: int = 16,
    max_batch: int = 256,
    max_pixels: int = 2**25,
    device: torch.device | str | None = None,
) -> Any:
    """The application which :func:`serve` runs, for another ASGI server or a test.

    Args:
        rewards: names, specs or rewards, or a mapping from what clients call them. Otherwise
            they have their own names, numbered where these repeat. Each is built once, here.
        token: what clients must send as ``Authorization: Bearer TOKEN``; ``"env:NAME"`` reads it
            from the environment.
        max_bytes: largest body of a request. Together the waiting ones take ``max_queue`` times
            as much memory.
        max_queue: requests that may be read, wait or be computed at a time; others get 429.
        max_batch: most samples in one request.
        max_pixels: of an image file, which may be far larger than its bytes.
        device: where rewards compute; None: CUDA if there is one.

    Returns:
        A ``fastapi.FastAPI``.

    Raises:
        ImportError: fastapi or uvicorn is missing.
        ValueError: no rewards, a limit below 1, or a token that cannot be one; and whatever
            :func:`~diffreward.rewards.make_reward` raises.
    """
    try:
        import uvicorn  # noqa: F401  (missed here rather than after the rewards were loaded)
        from fastapi import Depends, FastAPI, Request
        from fastapi.responses import JSONResponse
    except ImportError as err:
        raise ImportError(
            f'{err.name} is missing; install it with pip install "diffreward[serve]"'
        ) from err
    limits = dict(
        max_bytes=max_bytes, max_queue=max_queue, max_batch=max_batch, max_pixels=max_pixels
    )
    for name, limit in limits.items():
        if limit < 1:
            raise ValueError(f"{name} must be at least 1, but {limit} came")
    token = read_token(token)
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    served = {name: make_reward(spec) for name, spec in label_rewards(rewards).items()}
    queue = _Queue(max_queue)

    @asynccontextmanager
    async def lifespan(app: Any) -> AsyncIterator[None]:
        yield
        queue.close()

    # Without the pages that describe the API: they load scripts from elsewhere.
    app = FastAPI(title="diffreward", version=__version__, lifespan=lifespan, openapi_url=None)

    @app.exception_handler(_Refusal)
    async def explain(request: Request, refusal: _Refusal):
        return JSONResponse({"detail": str(refusal)}, refusal.status, refusal.headers)

    async def authorise(request: Request):
        sent = request.headers.get("authorization", "").encode()
        if token is not None and not hmac.compare_digest(sent, f"Bearer {token}".encode()):
            raise _Refusal(
                401,
                "this server wants the header 'Authorization: Bearer TOKEN', with its token",
                {"WWW-Authenticate": "Bearer"},
            )

    @app.get("/health")
    async def health():
        return {
            "name": "diffreward",
            "version": __version__,
            "rewards": list(served),
            "device": str(device),
            "queue": queue.length,
            "max_queue": max_queue,
        }

    @app.get("/rewards", dependencies=[Depends(authorise)])
    async def describe():
        infos = [replace(reward.info, name=name) for name, reward in served.items()]
        return {"rewards": [info_to_json(info) for info in infos], **limits}

    @app.post("/score", dependencies=[Depends(authorise)])
    async def score(request: Request):
        content_type = request.headers.get("content-type", "").split(";")[0].strip().lower()
        if content_type not in (JSON, SAFETENSORS, *_IMAGES):
            known = ", ".join((JSON, SAFETENSORS, *_IMAGES))
            raise _Refusal(415, f"the content type is one of {known}, but {content_type!r} came")
        query = request.query_params

        def compute(body: bytes) -> dict[str, Any]:
            with _refused(400):
                if content_type in _IMAGES:
                    check_names(query, ("prompt", "reward"), "parameter")
                    image, notes = _decode(body, _IMAGES[content_type], max_pixels)
                    samples = Samples(image, "image", query.getlist("prompt") or None)
                    names = query.getlist("reward") or None
                else:
                    if query:
                        raise ValueError("the prompts and rewards of such a body are in it")
                    samples, names = unpack(content_type, body)
                    notes = []
                names = list(served) if names is None else names
                check_names(names, list(served), "reward")
            if len(samples) > max_batch:
                raise _Refusal(
                    413, f"{len(samples)} samples came, but a request has at most {max_batch}"
                )
            asked = {name: served[name] for name in names}
            return {"scores": _score(asked, samples.to(device)), "notes": notes}

        with queue.place():
            body = await _read(request, max_bytes)
            return await queue.run(lambda: compute(body), request.is_disconnected)

    return app


class _Refusal(Exception):
    """A request that gets an error instead of scores."""

    def __init__(self, status: int, detail: str, headers: dict[str, str] | None = None) -> None:
        super().__init__(detail)
        self.status, self.headers = status, headers


@contextmanager
def _refused(status: int) -> Iterator[None]:
    """What is found wrong in here is the client's doing."""
    try:
        yield
    except ValueError as err:
        raise _Refusal(status, str(err)) from err


class _Queue:
    """One thread that computes, and a bounded number of requests, counted by the event loop."""

    def __init__(self, size: int) -> None:
        self.size, self.length = size, 0
        self._seconds = 1.0  # that a request takes, a running mean
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="rewards")

    @contextmanager
    def place(self) -> Iterator[None]:
        """Take one of the places, or refuse."""
        if self.length >= self.size:
            wait = min(max(math.ceil(self.length * self._seconds), 1), 60)
            raise _Refusal(
                429, f"all {self.size} places of the queue are taken", {"Retry-After": str(wait)}
            )
        self.length += 1
        try:
            yield
        finally:
            self.length -= 1

    async def run(self, compute: Callable[[], Any], is_gone: Callable[[], Any]) -> Any:
        """The result of ``compute``; if the client hangs up before its turn, it is dropped."""

        def timed() -> Any:
            started = time.monotonic()
            try:
                return compute()
            finally:
                self._seconds += 0.2 * (time.monotonic() - started - self._seconds)

        job = self._thread.submit(timed)
        result = asyncio.wrap_future(job)
        while not result.done():
            await asyncio.wait([result], timeout=1.0)
            if not result.done() and await is_gone() and job.cancel():
                raise _Refusal(499, "the client hung up")
        return result.result()

    def close(self) -> None:
        self._thread.shutdown(cancel_futures=True)


async def _read(request: Any, max_bytes: int) -> bytes:
    """The body, read no further than the limit."""
    too_large = _Refusal(413, f"the body of a request has at most {max_bytes} bytes")
    declared = request.headers.get("content-length", "")
    if declared.isdecimal() and int(declared) > max_bytes:
        raise too_large

    async def read() -> bytes:
        body = bytearray()
        async for chunk in request.stream():
            body += chunk
            if len(body) > max_bytes:
                raise too_large
        return bytes(body)

    from starlette.requests import ClientDisconnect

    try:
        return await asyncio.wait_for(read(), _UPLOAD_SECONDS)
    except ClientDisconnect as err:
        raise _Refusal(499, "the client hung up") from err
    except asyncio.TimeoutError as err:
        raise _Refusal(408, f"the body did not come within {_UPLOAD_SECONDS:g} s") from err


def _decode(
    body: bytes, file_format: str, max_pixels: int
) -> tuple[Float[Tensor, "1 3 h w"], list[str]]:
    """An image file's pixels and what was converted, as `diffreward score` does it.

    Raises:
        ValueError: it is no such file, or cut short.
        _Refusal: it has too many pixels; they are not decoded.
    """
    try:
        # Only its header, by the decoder of the declared type.
        with Image.open(io.BytesIO(body), formats=[file_format]) as image:
            width, height = image.size
        if width * height > max_pixels:
            raise _Refusal(413, f"{width} x {height} pixels are more than {max_pixels}")
        pixels, notes = decode_image(io.BytesIO(body))
    except _Refusal:
        raise
    except Image.DecompressionBombError as err:
        raise _Refusal(413, str(err)) from err
    except Exception as err:  # decoders raise whatever their formats' parsers do
        raise ValueError(f"the image cannot be decoded: {err}") from err
    return to_float(pixels[None]), notes


def _score(rewards: Mapping[str, Reward], samples: Samples) -> dict[str, Any]:
    def score(name: str, reward: Reward) -> dict[str, Any]:
        try:
            return scores_to_json(evaluate(reward, samples))
        except Exception as err:
            refused = isinstance(err, ValueError)  # evaluate's word for samples it cannot score
            if not refused:
                _log.exception("reward %r failed", name)
            detail = str(err) if refused else f"{type(err).__name__}: {err}"
            if repr(name) not in detail:
                detail = f"reward {name!r} failed: {detail}"
            raise _Refusal(422 if refused else 500, detail) from err

    with torch.no_grad(), share_towers():
        return {name: score(name, reward) for name, reward in rewards.items()}
