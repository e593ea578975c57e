"""Rewards over HTTP: a real server on a loopback port, and the reward that calls it."""

import io
import json
import math
import pickle
import re
import socket
import struct
import sys
import threading
import time
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from email.utils import formatdate
from http import client
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace
from urllib.parse import quote, urlsplit

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save

import diffreward
from diffreward import RewardInfo, Samples, Scores, evaluate, make_reward
from diffreward import serve as serving
from diffreward.rewards import remote as remote_module
from diffreward.rewards.base import as_reward
from diffreward.rewards.remote import pack, remote, scores_from_json, scores_to_json, unpack
from diffreward.rewards.testing import check_reward
from diffreward.rewards.towers import Preprocess

pytest.importorskip("fastapi")
uvicorn = pytest.importorskip("uvicorn")

COLOUR = {"name": "target_color", "color": "orange"}
PROMPTS = ["ein Käfer, „groß“", "一只红色的心 & a?b=c#d", "🦊\n\ttwo lines", "\ud800 lone"]


# --------------------------------------------------------------------------------------------
# Rewards and servers for these tests
# --------------------------------------------------------------------------------------------


@contextmanager
def running(rewards, **options) -> Iterator[str]:
    """The address of a server."""
    app = serving.create_app(rewards, **options)
    listener = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning"))
    thread = threading.Thread(target=server.run, daemon=True, kwargs={"sockets": [listener]})
    thread.start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"  # it listens already
    finally:
        server.should_exit = True
        thread.join()


def call(url, path, body=None, content_type=None, **headers):
    """Status, headers and JSON of one request, made without the code under test."""
    if content_type:
        headers["Content-Type"] = content_type
    connection = client.HTTPConnection(urlsplit(url).netloc, timeout=20)
    connection.request("POST" if body is not None else "GET", path, body, headers)
    response = connection.getresponse()
    answer = json.loads(response.read())
    connection.close()
    return response.status, response.headers, answer


def images(b=4, h=9, w=7, seed=0):
    return torch.rand(b, 3, h, w, generator=torch.Generator().manual_seed(seed))


def png(pixels: np.ndarray, file_format="PNG") -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, file_format)
    return file.getvalue()


def photo(h=9, w=7) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (h, w, 3), dtype=np.uint8)


def reward_of(function, name, **info):
    return as_reward(function, RewardInfo(name, **info))


def code_points(samples: Samples) -> torch.Tensor:
    """Different for different prompts."""
    return torch.tensor([sum((i + 1) * ord(c) for i, c in enumerate(p)) for p in samples.prompts])


letters = reward_of(lambda s: code_points(s).float(), "letters", needs_prompt=True)
words = reward_of(
    lambda s: torch.tensor([float(len(text.split())) for text in s.data]),
    "words",
    modality="text",
    range=(0, math.inf),
)
zeros = reward_of(lambda s: (s.data == 0).float().mean(dim=1), "zeros", modality="dna")


def rich(samples: Samples) -> Scores:
    """A constraint that is not always met, an uncertainty, a part that does not always apply."""
    mean = samples.data.mean(dim=(1, 2, 3))
    part = torch.where(mean > mean.new_tensor(0.5), mean, torch.nan)
    return Scores(mean.log() * 1e-30, mean / 3, {"bright part": part})


class Gate:
    """A reward that waits until it is let through."""

    def __init__(self):
        self.info = RewardInfo("gate")
        self.open, self.started = threading.Event(), threading.Semaphore(0)
        self.calls = self.inside = self.most_inside = 0

    def __call__(self, samples):
        self.calls += 1
        self.inside += 1
        self.most_inside = max(self.inside, self.most_inside)
        self.started.release()
        assert self.open.wait(20)
        self.inside -= 1
        return Scores(torch.ones(len(samples)))


@contextmanager
def scripted(*answers) -> Iterator[tuple[str, list]]:
    """A server that gives one answer after the other (the last for ever), and what it was asked.

    An answer is (status, headers, JSON), or None: it hangs up.
    """
    seen = []

    class Handler(BaseHTTPRequestHandler):
        def answer(self):
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            seen.append((self.command, self.path, dict(self.headers), body))
            said = answers[min(len(seen), len(answers)) - 1]
            if said is None:
                self.close_connection = True
                return
            status, headers, content = said
            text = content if isinstance(content, bytes) else json.dumps(content).encode()
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(text))}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(text)

        do_GET = do_POST = answer

        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", seen
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


WORDS = {
    "rewards": [{"name": "words", "modality": "text", "range": [0, "inf"], "from": "the future"}],
    "max_bytes": 10000,
    "max_batch": 100,
}
TWO = {"scores": {"words": {"value": [1.0, 2.0], "std": None, "parts": {}}}}
TEXTS = Samples(["one", "two words"], "text")


@pytest.fixture
def waits(monkeypatch) -> list:
    """The seconds that `remote` would have slept; it does not."""
    slept = []
    monkeypatch.setattr(remote_module, "time", SimpleNamespace(sleep=slept.append, time=time.time))
    return slept


@pytest.fixture(scope="module")
def url():
    rewards = ["jpeg_compressibility", COLOUR, letters, words, zeros, reward_of(rich, "rich")]
    with running(rewards, max_bytes=200_000, max_batch=5, max_pixels=10_000) as address:
        yield address


# --------------------------------------------------------------------------------------------
# The reward `remote`
# --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spec", ["jpeg_compressibility", COLOUR, reward_of(rich, "rich")])
def test_remote_scores_are_the_local_ones_to_the_bit(url, spec):
    local = make_reward(spec)
    there = make_reward("remote", url=url, reward=local.info.name)
    data = images(13)  # three requests
    data[3] = 0  # -inf for `rich`
    samples = Samples(data, "image", [f"{i}" for i in range(13)])
    ours, theirs = evaluate(local, samples), evaluate(there, samples)
    assert torch.equal(theirs.value, ours.value)
    assert (theirs.std is None) == (ours.std is None)
    if ours.std is not None:
        assert torch.equal(theirs.std, ours.std)
        assert ours.value.isneginf().tolist() == [i == 3 for i in range(13)]
        assert 0 < ours.parts["bright part"].isnan().sum() < 13
    assert theirs.parts.keys() == ours.parts.keys()
    for name, part in ours.parts.items():
        torch.testing.assert_close(theirs.parts[name], part, rtol=0, atol=0, equal_nan=True)
    assert there.info == replace(local.info, differentiable=False)


@pytest.mark.parametrize(
    "name, samples",
    [
        ("jpeg_compressibility", Samples(images(3), "image")),
        ("target_color", Samples(images(7), "image", list("abcdefg"))),
        ("letters", Samples(images(4), "image", PROMPTS)),
        ("words", Samples(["a", "b c", "", "d e f", "g h", "i"], "text")),
        ("zeros", Samples(torch.arange(24).reshape(6, 4) % 5 % 3, "dna")),
    ],
)
def test_remote_keeps_the_contract(url, name, samples):
    check_reward(remote(url, name), samples)


def test_prompts_context_and_precision_arrive_as_they_were_sent():
    received = []

    def spy(samples):
        received.append(samples)
        return torch.ones(len(samples))

    context = {"weight": torch.rand(2, 3).T[:2], "who": ["ä", {"n": [1, None]}]}
    batches = [
        Samples(images(2).double(), "image", PROMPTS[2:], context),
        Samples(images(2).half().transpose(2, 3), "image"),
        Samples(torch.tensor([[0, 2**40], [-1, 3]]), "dna"),
        Samples(torch.rand(2, 5, 4), "protein"),
        Samples(PROMPTS[:2], "text", PROMPTS[2:], {"who": ["x", "y"]}),
        Samples(PROMPTS[:2], "text", None, {"weight": torch.rand(2)}),
        Samples(images(2).unsqueeze(1), "video"),
    ]
    shared = images(2)  # a context may be the data themselves
    batches.append(Samples(shared, "image", None, {"reference": shared}))
    with running([reward_of(spy, "spy")]) as address:
        there = remote(address)
        for batch in batches:
            evaluate(there, batch)
    for got, sent in zip(received, batches, strict=True):
        assert (got.modality, got.prompts) == (sent.modality, sent.prompts)
        assert got.context.keys() == sent.context.keys()
        pairs = [(got.data, sent.data), *((got.context[k], sent.context[k]) for k in got.context)]
        for theirs, ours in pairs:
            if isinstance(ours, torch.Tensor):
                assert theirs.dtype == ours.dtype and torch.equal(theirs, ours)
            else:
                assert theirs == ours
    with pytest.raises(TypeError, match="context of these samples cannot be sent"):
        pack(Samples(images(1), "image", None, {"set": [{1, 2}]}), [])


def test_requests_stay_within_the_servers_limits(url):
    there = remote(url, "target_color")
    data = images(4, 70, 70)  # 58,800 bytes each: three fit 200,000 bytes
    sizes = [(list(at), len(body)) for at, _, body in there._requests(Samples(data, "image"))]
    assert [at for at, _ in sizes] == [[0, 1], [2, 3]]
    assert all(size <= 200_000 for _, size in sizes)
    many = there._requests(Samples(images(12), "image"))
    assert [list(at) for at, _, _ in many] == [[0, 1, 2, 3, 4], [5, 6, 7, 8, 9], [10, 11]]
    twelve = Samples(images(12), "image")
    assert torch.equal(evaluate(there, twelve).value, evaluate(make_reward(COLOUR), twelve).value)
    with pytest.raises(ValueError, match=r"sample 0 takes \d+ bytes, but .* at most 200000"):
        evaluate(there, Samples(images(2, 200, 200), "image"))
    size = len(pack(TEXTS, ["words"])[1])
    with running([words], max_bytes=size) as address:  # and the limit itself is within it
        assert evaluate(remote(address, "words"), TEXTS).value.tolist() == [1, 2]
        assert len(list(remote(address, "words")._requests(TEXTS))) == 1


def test_a_reward_that_fails_is_an_error_and_never_a_score():
    def broken(samples):
        raise RuntimeError("out of luck")

    nan = reward_of(lambda s: torch.where(s.data[:, 0] == 7, torch.nan, 1.0), "nan")
    whole = reward_of(lambda s: s.data.float().mean(), "whole")
    with running([reward_of(broken, "broken"), nan, whole, zeros], max_batch=4) as address:
        samples = Samples(torch.arange(8)[:, None], "dna")
        with pytest.raises(
            ValueError, match=r"samples 4 to 7, .* called 0: .* 422 .*'nan' gave nan to sample 3"
        ):
            evaluate(remote(address, "nan"), samples)
        with pytest.raises(ValueError, match=r"'whole' returned value of shape \(\)"):
            evaluate(remote(address, "whole"), samples)
        with pytest.raises(
            ConnectionError, match=r"1 attempts; .*500 .*'broken' failed: RuntimeError: out of luck"
        ):
            evaluate(remote(address, "broken", retries=0), samples)
        # one that fails beside one that does not
        body = save({"tokens": samples.data[:2]}, {"request": '{"modality": "dna"}'})
        status, _, answer = call(address, "/score", body, "application/octet-stream")
        assert status == 500 and "scores" not in answer


def test_which_reward_and_where(url):
    with pytest.raises(ValueError, match=r"serves jpeg_compressibility, .*rich; choose one with"):
        remote(url)
    with pytest.raises(ValueError, match="called 'target_colour'; did you mean 'target_color'"):
        remote(url, "target_colour")
    for wrong in ("127.0.0.1:8000", "ftp://there", "http://"):
        with pytest.raises(ValueError, match="no address such as"):
            remote(wrong)
    with pytest.raises(ValueError, match="retries=-1"):
        remote(url, "words", retries=-1)
    there = remote(url + "/", "words")  # a slash more, and into another process
    again = pickle.loads(pickle.dumps(there))
    assert evaluate(again, TEXTS).value.tolist() == [1, 2]


# --------------------------------------------------------------------------------------------
# Repeating
# --------------------------------------------------------------------------------------------

BUSY = (429, {"Retry-After": "7"}, {"detail": "full"})
FAILS = (503, {}, b"<html>gateway</html>")
SLOW = (408, {}, {"detail": "the body did not come"})


def test_a_busy_failing_or_absent_server_is_asked_again_and_later_each_time(waits):
    with scripted((200, {}, WORDS), None, FAILS, SLOW, BUSY, (200, {}, TWO)) as (address, seen):
        assert evaluate(remote(address), TEXTS).value.tolist() == [1, 2]
    assert [path for _, path, _, _ in seen] == ["/rewards"] + ["/score"] * 5
    assert len({body for *_, body in seen[1:]}) == 1
    for wait, longest in zip(waits[:3], (0.5, 1, 2), strict=True):
        assert longest / 2 <= wait <= longest
    assert waits[3:] == [7]


def test_retry_after_is_respected_and_bounded(waits):
    date = (429, {"Retry-After": formatdate(time.time() + 100, usegmt=True)}, {})
    hours, nonsense = ((429, {"Retry-After": said}, {}) for said in ("9000", "soon"))
    with scripted((200, {}, WORDS), date, hours, nonsense, (200, {}, TWO)) as (address, _):
        evaluate(remote(address, timeout=200), TEXTS)
    assert 95 < waits[0] <= 100 and waits[1] == 200 and waits[2] <= 2


def test_waits_grow_to_a_limit_and_differ_between_clients(waits):
    with scripted((200, {}, WORDS), FAILS) as (address, seen):
        with pytest.raises(
            ConnectionError, match=r"no answer .* in 10 attempts; the last: 503 .*gateway"
        ):
            evaluate(remote(address, retries=9), TEXTS)
        assert len(seen) == 11 and len(waits) == 9
        assert all(15 <= wait <= 30 for wait in waits[6:])
        with pytest.raises(ConnectionError):
            remote(address, retries=3)
    assert not set(waits[9:]) & set(waits[:3])


@pytest.mark.parametrize("status", [400, 413, 422, 404, 307])
def test_what_a_server_refuses_is_not_repeated(waits, status):
    elsewhere = {"Location": "http://127.0.0.1:9/"}
    refusal = (status, elsewhere, {"detail": "a reason"})
    with scripted((200, {}, WORDS), refusal) as (address, seen):
        there = remote(address)
        with pytest.raises(ValueError, match=rf"refuses: {status} .*a reason"):
            evaluate(there, TEXTS)
        assert len(seen) == 2 and not waits


@pytest.mark.parametrize("status", [401, 403])
def test_a_token_that_is_refused_is_not_sent_again(waits, status):
    with scripted((200, {}, WORDS), (status, {}, {"detail": "who?"})) as (address, seen):
        with pytest.raises(PermissionError, match=f"wants the right token=: {status} .*who"):
            evaluate(remote(address, token="old"), TEXTS)
        assert len(seen) == 2 and not waits


def test_an_absent_server_is_an_error_when_the_reward_is_built(waits):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = f"http://127.0.0.1:{listener.getsockname()[1]}"
    with pytest.raises(ConnectionError, match=rf"{address} in 3 attempts; .*refused"):
        make_reward({"name": "remote", "url": address, "retries": 2})
    assert len(waits) == 2


def test_a_server_that_never_answers(waits):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = f"http://127.0.0.1:{listener.getsockname()[1]}"
        with pytest.raises(ConnectionError, match="in 2 attempts; the last: TimeoutError"):
            remote(address, timeout=0.1, retries=1)


@pytest.mark.parametrize(
    "answers, says",
    [
        (["no JSON"], "did not answer in JSON"),
        ([{"hello": "world"}], "not as a reward server does"),
        ([["a"]], "not as a reward server does"),
        ([WORDS, {"scores": {}}], "an answer without scores"),
        ([WORDS, {"scores": {"words": {**TWO["scores"]["words"], "value": [0.0]}}}], "1 scores to"),
        ([WORDS, {"scores": {"words": {**TWO["scores"]["words"], "value": [0.0] * 3}}}], "3 sc"),
    ],
)
def test_an_answer_that_is_none(waits, answers, says):
    answers = [a.encode() if isinstance(a, str) else a for a in answers]
    with scripted(*((200, {}, answer) for answer in answers)) as (address, _):
        with pytest.raises(ConnectionError, match=says):
            evaluate(remote(address), TEXTS)


def test_a_refusal_before_the_body_was_read_is_read():
    """A gateway may answer 413 and hang up while the client is still sending."""
    listener = socket.create_server(("127.0.0.1", 0))

    def gateway():
        for answer in (json.dumps({**WORDS, "max_bytes": 10**9}), '{"detail": "too much"}'):
            connection, _ = listener.accept()
            connection.recv(100)
            status = "200 OK" if "rewards" in answer else "413 Too Large"
            head = f"HTTP/1.1 {status}\r\nContent-Length: {len(answer)}\r\n\r\n"
            connection.sendall((head + answer).encode())
            if status.startswith("413"):
                connection.shutdown(socket.SHUT_RD)  # the rest of the body is not taken
                time.sleep(0.2)
            connection.close()

    thread = threading.Thread(target=gateway, daemon=True)
    thread.start()
    there = remote(f"http://127.0.0.1:{listener.getsockname()[1]}", retries=0)
    with pytest.raises(ValueError, match="413 .*too much"):
        evaluate(there, Samples(["x" * 20_000_000], "text"))
    thread.join()
    listener.close()


# --------------------------------------------------------------------------------------------
# The server: what it tells and who may ask
# --------------------------------------------------------------------------------------------


def test_health_and_rewards(url):
    status, _, health = call(url, "/health")
    assert status == 200
    assert health["name"] == "diffreward" and health["version"] == diffreward.__version__
    assert health["rewards"][:2] == ["jpeg_compressibility", "target_color"]
    assert health["device"] == ("cuda" if torch.cuda.is_available() else "cpu")
    assert health["queue"] == 0
    _, _, answer = call(url, "/rewards")
    first = answer["rewards"][0]
    assert first["modality"] == "image" and first["range"] == ["-inf", 0.0]
    assert first["needs_prompt"] is False and first["source"].startswith("Black et al.")
    assert (answer["max_bytes"], answer["max_batch"]) == (200_000, 5)
    assert call(url, "/docs")[0] == call(url, "/openapi.json")[0] == 404


def test_a_token_is_asked_for_everywhere_but_at_health(monkeypatch):
    monkeypatch.setenv("REWARDS_TOKEN", "s3cret")
    with running([words], token="env:REWARDS_TOKEN") as address:
        assert call(address, "/health")[0] == 200
        text = json.dumps({"data": ["a b"]})
        for sent in (None, "Bearer", "Bearer s3cre", "Bearer s3cret2", "s3cret", "Bearer \xe9"):
            headers = {} if sent is None else {"Authorization": sent}
            for status, headers_back, answer in (
                call(address, "/rewards", **headers),
                call(address, "/score", text, "application/json", **headers),
            ):
                assert status == 401 and "Bearer" in answer["detail"]
                assert headers_back["WWW-Authenticate"] == "Bearer"
        right = {"Authorization": "Bearer s3cret"}
        status, _, answer = call(address, "/score", text, "application/json", **right)
        assert status == 200 and answer["scores"]["words"]["value"] == [2.0]
        assert evaluate(remote(address, token="s3cret"), TEXTS).value.tolist() == [1, 2]
        assert evaluate(remote(address, token="env:REWARDS_TOKEN"), TEXTS).value.tolist() == [1, 2]
        for wrong in (None, "other"):
            with pytest.raises(PermissionError, match="wants the right token=: 401"):
                remote(address, token=wrong)


def test_a_token_is_compared_in_constant_time(monkeypatch):
    compared, compare = [], serving.hmac.compare_digest

    def spy(sent, expected):
        compared.append((sent, expected))
        return compare(sent, expected)

    monkeypatch.setattr(serving, "hmac", SimpleNamespace(compare_digest=spy))
    with running([words], token="s3cret") as address:
        assert call(address, "/rewards", Authorization="Bearer s3")[0] == 401
        assert call(address, "/rewards", Authorization="Bearer s3cret")[0] == 200
    assert compared == [(b"Bearer s3", b"Bearer s3cret"), (b"Bearer s3cret",) * 2]


def test_rewards_of_one_name_are_told_apart():
    samples = Samples(images(3), "image")
    red, orange = (evaluate(make_reward(spec), samples).value for spec in ("target_color", COLOUR))
    with running(["target_color", COLOUR]) as address:
        assert torch.equal(evaluate(remote(address, "target_color"), samples).value, red)
        assert torch.equal(evaluate(remote(address, "target_color 2"), samples).value, orange)
    with running({"warm": COLOUR, "bad": lambda samples: samples.data.mean()}) as address:
        assert torch.equal(evaluate(remote(address, "warm"), samples).value, orange)
        with pytest.raises(ValueError, match="reward 'bad' failed: reward '<lambda>' returned"):
            evaluate(remote(address, "bad"), samples)


def test_rewards_of_one_request_share_their_work():
    read = []
    preprocess = Preprocess((4, 4), (0.0,) * 3, (1.0,) * 3)

    def reader(samples):
        read.append(preprocess(samples.data))
        return read[-1].mean(dim=(1, 2, 3))

    body = save({"images": images(2)})
    with running({"a": reader, "b": reader}) as address:
        for _ in range(2):
            assert call(address, "/score", body, OCTETS)[0] == 200
    assert read[0] is read[1] and read[2] is read[3] and read[1] is not read[2]


@pytest.mark.parametrize("token", ["", " ", "two\nlines", "schlüssel"])
def test_what_cannot_be_a_token(token):
    with pytest.raises(ValueError, match="printable ASCII"):
        serving.create_app([words], token=token)
    with pytest.raises(ValueError, match="NO_SUCH_VARIABLE is not set"):
        remote("http://127.0.0.1:1", token="env:NO_SUCH_VARIABLE")


def test_what_cannot_be_served(monkeypatch):
    with pytest.raises(ValueError, match="at least one reward"):
        serving.create_app([])
    with pytest.raises(ValueError, match="did you mean: target_color"):
        serving.create_app(["target_colour"])
    with pytest.raises(ValueError, match="max_queue must be at least 1"):
        serving.create_app([words], max_queue=0)
    monkeypatch.setitem(sys.modules, "fastapi", None)
    with pytest.raises(ImportError, match=r'fastapi is missing.*pip install "diffreward\[serve\]"'):
        serving.create_app([words])


def test_only_loopback_goes_without_a_token(monkeypatch, recwarn):
    runs = []
    monkeypatch.setattr(uvicorn, "run", lambda app, **options: runs.append(options))
    serving.serve([words])
    assert runs == [{"host": "127.0.0.1", "port": 8000}]
    for host in ("localhost", "::1", "127.0.0.2"):
        serving.serve([words], host)
    serving.serve([words], "0.0.0.0", token="t")
    assert not [w for w in recwarn if w.category is UserWarning]
    for host in ("0.0.0.0", "::", "example.org"):
        with pytest.warns(UserWarning, match="without a token"):
            serving.serve([words], host, max_queue=1)


# --------------------------------------------------------------------------------------------
# The server: image files
# --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["png", "jpeg", "webp"])
def test_an_image_file_is_scored_with_its_prompt(url, kind):
    pixels = photo()
    body = png(pixels, kind)
    seen = np.asarray(Image.open(io.BytesIO(body)).convert("RGB"))
    samples = Samples(torch.from_numpy(seen.copy()).permute(2, 0, 1)[None] / 255, "image")
    for prompt in PROMPTS[:3]:
        path = f"/score?reward=letters&reward=jpeg_compressibility&prompt={quote(prompt)}"
        status, _, answer = call(url, path, body, f"image/{kind}; charset=binary")
        assert status == 200
        scores = answer["scores"]
        assert list(scores) == ["letters", "jpeg_compressibility"]
        expected = sum((i + 1) * ord(c) for i, c in enumerate(prompt))
        assert scores["letters"]["value"] == [expected]
        local = evaluate(make_reward("jpeg_compressibility"), samples).value
        assert scores["jpeg_compressibility"]["value"] == local.tolist()


def test_files_of_other_modes(url):
    """Grey of 8 and 16 bits, palette and transparent images are what they look like."""
    grey = np.full((5, 5), 51, np.uint8)
    deep = np.full((5, 5), 51 * 257, np.uint16)
    palette = Image.new("P", (5, 5), 3)
    palette.putpalette([0, 0, 0] * 3 + [51, 51, 51])
    clear = Image.new("RGBA", (5, 5), (255, 0, 0, 0))  # invisible red: white
    with running([{"name": "target_color", "color": "black"}]) as address:
        for image, level, notes in [
            (Image.fromarray(grey), 0.2, []),
            (Image.fromarray(deep), 0.2, ["16-bit"]),
            (palette, 0.2, ["palette"]),
            (clear, 1.0, ["transparency on white"]),
        ]:
            file = io.BytesIO()
            image.save(file, "PNG")
            _, _, answer = call(address, "/score", file.getvalue(), "image/png")
            assert answer["notes"] == notes
            (value,) = answer["scores"]["target_color"]["value"]
            assert value == pytest.approx(-(level**2), abs=1e-6)


def header_of_a_png(width: int, height: int) -> bytes:
    def chunk(kind, data):
        checksum = struct.pack(">I", zlib.crc32(kind + data))
        return struct.pack(">I", len(data)) + kind + data + checksum

    size = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", size)
        + chunk(b"IDAT", zlib.compress(b"\0" * 100))
        + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize(
    "body, kind, status, says",
    [
        (png(photo(90, 90))[:-9000], "png", 400, "cannot be decoded: .*truncated"),
        (png(photo(90, 90), "JPEG")[:-3000], "jpeg", 400, "cannot be decoded: .*truncated"),
        (b"", "png", 400, "cannot be decoded"),
        (b"GIF89a nonsense", "png", 400, "cannot be decoded"),
        (png(photo()), "jpeg", 400, "cannot be decoded"),  # not what it says it is
        (png(photo(200, 51)), "png", 413, "51 x 200 pixels are more than 10000"),
        (header_of_a_png(10_000, 10_000), "png", 413, "10000 x 10000 pixels"),
        (header_of_a_png(100_000, 100_000), "png", 413, "exceeds limit"),  # PIL's own
        (header_of_a_png(100, 90), "png", 400, "cannot be decoded"),
        (png(photo()), "tiff", 415, "the content type is one of .*, but 'image/tiff' came"),
    ],
)
@pytest.mark.filterwarnings("ignore:Image size")
def test_images_that_cannot_be_read(url, body, kind, status, says):
    found, _, answer = call(url, "/score?reward=jpeg_compressibility", body, f"image/{kind}")
    assert found == status, answer
    assert re.search(says, answer["detail"])
    assert call(url, "/health")[2]["queue"] == 0


def test_an_image_may_have_as_many_pixels_as_the_limit_says(url):
    for (h, w), expected in [((100, 100), 200), ((73, 137), 413)]:
        path = "/score?reward=jpeg_compressibility"
        assert call(url, path, png(photo(h, w)), "image/png")[0] == expected


@pytest.mark.parametrize(
    "query, status, says",
    [
        ("reward=letters", 422, "'letters' compares samples with their prompts"),
        ("reward=words", 422, "'words' scores text samples, but image samples came"),
        ("reward=jpeg_compresibility", 400, "did you mean 'jpeg_compressibility'"),
        ("rewards=letters", 400, "no parameter 'rewards'; did you mean 'reward'"),
        ("prompt=a&prompt=b&reward=letters", 400, "prompts has 2 entries for 1 samples"),
    ],
)
def test_addresses_that_ask_for_the_wrong_thing(url, query, status, says):
    found, _, answer = call(url, f"/score?{query}", png(photo()), "image/png")
    assert found == status and says in answer["detail"]


# --------------------------------------------------------------------------------------------
# The server: safetensors and JSON
# --------------------------------------------------------------------------------------------


def test_a_batch_written_by_hand(url):
    pixels = torch.from_numpy(np.stack([photo(), 255 - photo()])).permute(0, 3, 1, 2).contiguous()
    request = {"rewards": ["target_color", "letters"], "prompts": PROMPTS[:2]}
    samples = Samples(pixels / 255, "image", PROMPTS[:2])
    for tensor in (pixels, pixels / 255):
        body = save({"images": tensor}, {"request": json.dumps(request)})
        status, _, answer = call(url, "/score", body, "application/octet-stream")
        assert status == 200 and list(answer["scores"]) == request["rewards"]
        value = torch.tensor(answer["scores"]["target_color"]["value"])
        assert torch.equal(value, evaluate(make_reward(COLOUR), samples).value)
        expected = code_points(samples).tolist()
        assert answer["scores"]["letters"] == {"value": expected, "std": None, "parts": {}}
    request = {"rewards": ["zeros"], "modality": "dna"}
    body = save({"tokens": torch.tensor([[0, 1], [0, 0]])}, {"request": json.dumps(request)})
    _, _, answer = call(url, "/score", body, "application/octet-stream")
    assert answer["scores"]["zeros"]["value"] == [0.5, 1.0]
    with running(["jpeg_compressibility", COLOUR]) as address:  # without metadata: all rewards
        body = save({"images": pixels})
        _, _, answer = call(address, "/score", body, "application/octet-stream")
        assert list(answer["scores"]) == ["jpeg_compressibility", "target_color"]


def test_numbers_survive_json():
    bits = torch.randint(-(2**31), 2**31 - 1, (2000,), generator=torch.Generator().manual_seed(0))
    value = bits.to(torch.int32).view(torch.float32)  # every exponent, subnormals too
    value[:3] = torch.tensor([math.inf, -math.inf, -0.0])
    sent = Scores(value, value.abs(), {"": value, "NaN": torch.full((2000,), math.nan)})
    text = json.dumps(scores_to_json(sent), allow_nan=False)
    got = scores_from_json(json.loads(text))
    for theirs, ours in [(got.value, sent.value), (got.std, sent.std), (got.parts[""], value)]:
        torch.testing.assert_close(theirs, ours, rtol=0, atol=0, equal_nan=True)
        assert torch.equal(theirs.signbit() & ~ours.isnan(), ours.signbit() & ~ours.isnan())
    assert got.parts["NaN"].isnan().all()


OCTETS, TEXT = "application/octet-stream", "application/json"
IMAGE = torch.zeros(1, 3, 4, 4)


def file(tensors, **request) -> bytes:
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    return save(tensors, {"request": json.dumps(request)})


def lying(data=bytes(192), length=None, also=(), **said) -> bytes:
    """A safetensors file of one image of 192 bytes, whose header says something else."""
    truth = {"dtype": "F32", "shape": [1, 3, 4, 4], "data_offsets": [0, 192]}
    header = json.dumps({"images": {**truth, **said}, **dict(also)}).encode()
    return struct.pack("<Q", len(header) if length is None else length) + header + data


@pytest.mark.parametrize(
    "content_type, body, status, says",
    [
        (OCTETS, b"", 400, "not a safetensors file"),
        (OCTETS, b"\xff" * 8 + b"{}", 400, "not a safetensors file"),
        (OCTETS, file({"images": IMAGE})[:-1], 400, "not a safetensors file"),
        (OCTETS, struct.pack("<Q", 20_000) + b"[" * 20_000, 400, "not a safetensors file"),
        (OCTETS, lying(shape=[2, 3, 4, 4]), 400, "not a safetensors file"),
        (OCTETS, lying(shape=[2**40, 3, 4, 4]), 400, "not a safetensors file"),
        (OCTETS, lying(shape=[2**62, 2**62, 4, 4]), 400, "not a safetensors file"),
        (OCTETS, lying(shape=[-1, 3, 4, 4]), 400, "not a safetensors file"),
        (OCTETS, lying(data_offsets=[0, 2**50]), 400, "not a safetensors file"),
        (OCTETS, lying(data_offsets=[192, 0]), 400, "not a safetensors file"),
        (OCTETS, lying(data_offsets=[8, 200], data=bytes(200)), 400, "not a safetensors file"),
        (OCTETS, lying(data=bytes(200)), 400, "not a safetensors file"),
        (OCTETS, lying(length=10), 400, "not a safetensors file"),
        (OCTETS, lying(length=150), 400, "not a safetensors file"),
        (OCTETS, lying(length=2**63), 400, "not a safetensors file"),
        (OCTETS, lying(dtype="F13"), 400, "not a safetensors file"),
        (OCTETS, lying(also={"__metadata__": [1]}), 400, "not a safetensors file"),
        (OCTETS, lying(also={"__metadata__": {"request": {}}}), 400, "not a safetensors file"),
        (OCTETS, lying(also={"__metadata__": None}), 422, "'letters' compares"),  # all rewards
        (OCTETS, file({"images": IMAGE.to(torch.float8_e5m2)}), 400, "'images' is of torch.float8"),
        (OCTETS, save({"images": IMAGE}, {"request": "{"}), 400, "not JSON"),
        (OCTETS, file({}), 400, "there is none of them"),
        (OCTETS, file({"images": IMAGE, "data": IMAGE}), 400, "there is images and data"),
        (OCTETS, file({"images": IMAGE}, data=["a"]), 400, "there is images and data"),
        (OCTETS, file({"images": IMAGE[0]}), 400, "shape (b, 3, h, w), but (3, 4, 4) came"),
        (OCTETS, file({"images": IMAGE.long()}), 400, "must be floating point"),
        (OCTETS, file({"images": torch.zeros(10**9, 3, 0, 4)}), 400, "are empty"),
        (OCTETS, file({"images": IMAGE, "image": IMAGE}), 400, "no use for a tensor 'image'"),
        (OCTETS, file({"tokens": IMAGE}), 400, "'modality' is a name"),
        (OCTETS, file({"images": IMAGE}, prompts="a"), 400, "'prompts' is a list of strings"),
        (OCTETS, file({"images": IMAGE}, prompts=["a", "b"]), 400, "prompts has 2 entries for 1"),
        (OCTETS, file({"images": IMAGE}, prompt=["a"]), 400, "did you mean 'prompts'"),
        (OCTETS, file({"images": IMAGE}, context=[1]), 400, "'context' is an object of lists"),
        (OCTETS, file({"images": IMAGE}, context={"a": [1, 2]}), 400, "a has 2 entries for 1"),
        (OCTETS, file({"images": IMAGE.expand(6, -1, -1, -1)}), 413, "at most 5"),
        (OCTETS, file({"images": IMAGE * math.nan}, rewards=["rich"]), 422, "sample 0 has NaN"),
        (OCTETS, file({"images": IMAGE}, rewards=["letters"]), 422, "'letters' compares"),
        (TEXT, b"[1]", 400, "is a JSON object, but a list came"),
        (TEXT, b"[" * 100_000, 400, "not JSON"),
        (TEXT, b"\xff", 400, "not JSON"),
        (TEXT, json.dumps({"data": "text"}), 400, "'data' is a list of strings"),
        (TEXT, json.dumps({"data": ["a"], "rewards": ["word"]}), 400, "did you mean 'words'"),
        (TEXT, json.dumps({"data": ["a"], "modality": "image"}), 400, "images must have shape"),
        (TEXT, json.dumps({"data": [], "rewards": ["words"]}), 422, "was given no samples"),
        (TEXT, json.dumps({"data": ["a"] * 6, "rewards": ["words"]}), 413, "at most 5"),
        ("text/plain", b"a", 415, "but 'text/plain' came"),
    ],
)
def test_bodies_that_cannot_be_scored(url, content_type, body, status, says):
    found, _, answer = call(url, "/score", body, content_type)
    assert found == status, answer
    assert says in answer["detail"]


def test_a_body_is_not_read_beyond_the_limit(url):
    body = save({"images": torch.zeros(1, 3, 200, 200)})
    status, _, answer = call(url, "/score", body, OCTETS)
    assert status == 413 and "at most 200000 bytes" in answer["detail"]
    # announced: the answer is there before the body
    with socket.create_connection(urlsplit(url).netloc.split(":"), timeout=20) as connection:
        connection.sendall(
            f"POST /score HTTP/1.1\r\nHost: x\r\nContent-Type: {OCTETS}\r\n"
            "Content-Length: 200001\r\n\r\n".encode()
        )
        assert connection.recv(1000).startswith(b"HTTP/1.1 413 ")
    # in chunks, of which nobody says how many will come: the answer is there before the end
    with socket.create_connection(urlsplit(url).netloc.split(":"), timeout=20) as connection:
        connection.sendall(
            f"POST /score HTTP/1.1\r\nHost: x\r\nContent-Type: {OCTETS}\r\n"
            "Transfer-Encoding: chunked\r\n\r\n".encode()
        )
        for _ in range(21):
            connection.sendall(b"2710\r\n" + b"\0" * 10_000 + b"\r\n")
        assert connection.recv(1000).startswith(b"HTTP/1.1 413 ")


def test_a_body_that_does_not_come(monkeypatch):
    monkeypatch.setattr(serving, "_UPLOAD_SECONDS", 0.1)
    with running([words], max_queue=1) as address:
        with slow_upload(address) as waiting:
            assert waiting.recv(1000).startswith(b"HTTP/1.1 408 ")
        assert call(address, "/health")[2]["queue"] == 0


@contextmanager
def slow_upload(address, **headers) -> Iterator[socket.socket]:
    """A client that has sent one byte of a body of nine."""
    with socket.create_connection(urlsplit(address).netloc.split(":"), timeout=20) as sending:
        more = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
        sending.sendall(
            f"POST /score HTTP/1.1\r\nHost: x\r\nContent-Type: {TEXT}\r\n{more}"
            "Content-Length: 9\r\n\r\n{".encode()
        )
        yield sending


def test_a_slow_client_takes_a_place_and_nobody_elses_time():
    text = json.dumps({"data": ["a"]})
    with running([words], max_queue=2) as address, slow_upload(address) as slow:
        wait_for_queue(address, 1)
        for _ in range(3):
            assert call(address, "/score", text, TEXT)[0] == 200
        with slow_upload(address):
            wait_for_queue(address, 2)
            assert call(address, "/score", text, TEXT)[0] == 429
        wait_for_queue(address, 1)
        slow.sendall(b'"data":1')  # it comes in the end, and is read
        answer = slow.recv(1000)
        assert answer.startswith(b"HTTP/1.1 400 ")
        wait_for_queue(address, 0)


def test_who_has_no_token_takes_no_place():
    with running([words], max_queue=1, token="s3cret") as address, slow_upload(address) as slow:
        assert slow.recv(1000).startswith(b"HTTP/1.1 401 ")  # before its body was sent
        assert call(address, "/health")[2]["queue"] == 0


def test_who_hangs_up_while_sending_leaves_no_trace(caplog):
    with running([words]) as address:
        with slow_upload(address):
            wait_for_queue(address, 1)
        wait_for_queue(address, 0)
    assert not [record for record in caplog.records if record.levelname == "ERROR"]


# --------------------------------------------------------------------------------------------
# The queue
# --------------------------------------------------------------------------------------------


def ask(address, results):
    def run():
        results.append(call(address, "/score", json.dumps({"data": ["a"]}), TEXT))

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    return thread


def wait_for_queue(address, length):
    deadline = time.monotonic() + 20
    while call(address, "/health")[2]["queue"] != length:
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_one_request_is_computed_at_a_time_and_a_full_queue_says_when_to_come_back():
    gate, results = Gate(), []
    with running([gate], max_queue=3) as address:
        threads = [ask(address, results) for _ in range(3)]
        assert gate.started.acquire(timeout=20)
        wait_for_queue(address, 3)  # and /health answers while a reward computes
        status, headers, answer = call(address, "/score", json.dumps({"data": ["a"]}), TEXT)
        assert status == 429 and "all 3 places" in answer["detail"]
        assert 1 <= int(headers["Retry-After"]) <= 60
        gate.open.set()
        for thread in threads:
            thread.join()
        wait_for_queue(address, 0)
    assert [status for status, _, _ in results] == [200] * 3
    assert gate.calls == 3 and gate.most_inside == 1


@pytest.mark.parametrize("seconds, says", [(0.001, "1"), (7.5, "15"), (1000.0, "60")])
def test_who_comes_back_is_told_when_the_queue_will_be_empty(seconds, says):
    queue = serving._Queue(2)
    queue._seconds = seconds  # a request takes so long
    with queue.place(), queue.place(), pytest.raises(serving._Refusal) as refused:
        queue.place().__enter__()
    assert refused.value.status == 429 and refused.value.headers == {"Retry-After": says}
    assert queue.length == 0


def test_remote_waits_for_a_full_queue(monkeypatch):
    gate, results, waits = Gate(), [], []
    with running([gate], max_queue=1) as address:
        thread = ask(address, results)
        assert gate.started.acquire(timeout=20)

        def sleep(seconds):
            waits.append(seconds)
            gate.open.set()
            wait_for_queue(address, 0)

        monkeypatch.setattr(remote_module, "time", SimpleNamespace(sleep=sleep, time=time.time))
        assert evaluate(remote(address), TEXTS).value.tolist() == [1, 1]
        thread.join()
    assert len(waits) == 1 and waits[0] >= 1


def test_who_hangs_up_leaves_the_queue():
    gate, results = Gate(), []
    with running([gate], max_queue=2) as address:
        thread = ask(address, results)
        assert gate.started.acquire(timeout=20)
        impatient = client.HTTPConnection(urlsplit(address).netloc)
        body = json.dumps({"data": ["b"]})
        impatient.request("POST", "/score", body, {"Content-Type": TEXT})
        wait_for_queue(address, 2)
        impatient.close()
        wait_for_queue(address, 1)
        gate.open.set()
        thread.join()
    assert gate.calls == 1 and results[0][0] == 200


def test_unpack_is_the_inverse_of_pack():
    data = images(2)  # and a context which shares their memory
    sent = Samples(data, "image", PROMPTS[:2], {"w": torch.ones(2), "reference": data})
    got, names = unpack(*pack(sent, ["a", "b"]))
    assert names == ["a", "b"] and got.prompts == sent.prompts
    assert torch.equal(got.data, sent.data) and torch.equal(got.context["w"], torch.ones(2))
