"""Generated requests to the servers: answered, or refused below 500, and others are answered as before.

The bodies are safetensors with JSON metadata, which no OpenAPI description can say; so hypothesis makes them.
"""

import json
from typing import Any

import numpy as np
import pytest
import torch
from fastapi.testclient import TestClient
from hypothesis import strategies as st
from safetensors.numpy import save

from opd.rollout.app import EngineHost, ServedModel, rollout_app
from opd.rollout.wire import FORMAT as ROLLOUT_FORMAT
from opd.serving.app import MEDIA_TYPE
from opd.sync.message import DIGEST_BYTES, read_message
from opd.sync.receiver import WeightReceiver
from opd.sync.sender import WeightSender
from opd.teacher.wire import read_response, request_bytes
from tests.faults.test_rollout_requests import IDS, VOCAB, OneTokenEngine
from tests.faults.test_server_requests import score_request
from tests.support.bad_files import HOSTILE, damaged, reshaped
from tests.support.fuzz import fuzz, require_sentence, shares
from tests.support.teacher_apps import stub_app

OCTETS = {"content-type": MEDIA_TYPE}
WEIGHTS = {"w": torch.ones(2, 3), "b": torch.ones(4)}
WORDS = (
    "0",
    "1",
    "-1",
    "2",
    "97",
    "99",
    "1e-300",
    "1e300",
    "nan",
    "inf",
    "",
    "x",
    "1_0",
    "9" * 400,
)

numbers = st.sampled_from((-(2**31), -1, 0, 1, 2, 3, 79, 80, VOCAB, 2**31 - 1))
shapes = st.sampled_from(((0,), (1,), (2,), (4,), (2, 0), (2, 2), (4, 1), (2, 2, 1), ()))
dtypes = st.sampled_from((np.int32, np.int32, np.int32, np.int64, np.float32, np.uint8))


def made(shape: tuple[int, ...], dtype: Any, value: int) -> np.ndarray:
    return np.full(shape, value).astype(dtype)


arrays = st.builds(made, shapes, dtypes, numbers)


def require_refusal_or_answer(answer: Any) -> bool:
    """Whether it is an answer; below 500 and in words otherwise."""
    if answer.status_code == 200:
        return True
    assert 400 <= answer.status_code < 500, (answer.status_code, answer.text[:300])
    require_sentence("".join(c if c.isprintable() else "?" for c in answer.text))
    assert "\n" not in answer.text
    return False


@pytest.fixture(scope="module")
def teacher() -> TestClient:
    return TestClient(stub_app())


@shares(20)
def test_score(examples: int, teacher: TestClient) -> None:
    good = request_bytes(score_request())
    expected = teacher.post("/score", content=good, headers=OCTETS).content
    size = int.from_bytes(good[:8], "little")
    header = json.loads(good[8 : 8 + size])
    tensors = {
        "token_ids": np.array([1, 2, 3, 4], np.int32),
        "lengths": np.array([4], np.int32),
        "starts": np.array([2], np.int32),
    }
    names = st.sampled_from((*tensors, "named_ids", "other"))
    texts = st.dictionaries(st.sampled_from((*header["__metadata__"], "x")), st.sampled_from(WORDS))
    built = st.builds(
        lambda changed, words: save(tensors | changed, header["__metadata__"] | words),
        st.dictionaries(names, arrays, max_size=2),
        texts,
    )

    def check(body: bytes) -> None:
        answer = teacher.post("/score", content=body, headers=OCTETS)
        if require_refusal_or_answer(answer):
            scores = read_response(answer.content)
            assert np.isfinite(scores.logps).all()
            assert (scores.logps <= 1e-3).all()
        assert teacher.post("/score", content=good, headers=OCTETS).content == expected

    fuzz(check, built | built | damaged(good), examples=examples)


@shares(5)
def test_head_and_info(examples: int, teacher: TestClient) -> None:
    words = st.sampled_from(WORDS)
    queries = st.dictionaries(st.sampled_from(("start", "stop", "bfloat16", "x")), words)
    headers = st.dictionaries(st.sampled_from(("authorization", "content-type", "range")), words)

    def check(path: str, query: dict[str, str], extra: dict[str, str]) -> None:
        require_refusal_or_answer(teacher.get(path, params=query, headers=extra))

    fuzz(check, st.sampled_from(("/head", "/head", "/info")), queries, headers, examples=examples)


@pytest.fixture(scope="module")
def rollouts() -> TestClient:
    receiver = WeightReceiver(
        lambda tensors, changes, version: None,
        {name: tuple(w.shape) for name, w in WEIGHTS.items()},
    )
    host = EngineHost(
        engine=OneTokenEngine(),
        model=ServedModel(
            model="m", dtype="float32", max_length=64, vocab_size=VOCAB, stop_ids=[1]
        ),
        take=receiver.take,
        state=receiver.state,
    )
    client = TestClient(rollout_app(lambda: host, token=None, max_request_bytes=1 << 20))
    client.post("/weights", content=message(3), headers=OCTETS)
    return client


def message(version: int) -> bytes:
    sender = WeightSender(dtype=torch.float32, snapshot_every=1, run="r")
    sender.prepare(WEIGHTS.items(), version)
    body = sender.next_for(WeightReceiver(lambda *_: None).state())
    assert body is not None
    return body


def rollout_body(fields: Any, tensors: dict[str, np.ndarray]) -> bytes:
    return save(tensors, {"format": ROLLOUT_FORMAT, "request": json.dumps(fields)})


@shares(20)
def test_generate(examples: int, rollouts: TestClient) -> None:
    fields = {"uids": ["p"], "sampling": {"n": 2, "max_tokens": 9}, "run": "r", "version": 3}
    tensors = {"token_ids": IDS, "lengths": np.array([4], np.int32)}
    good = rollout_body(fields, tensors)
    expected = rollouts.post("/generate", content=good, headers=OCTETS)
    assert expected.status_code == 200, expected.text
    names = st.sampled_from(("token_ids", "lengths", "other"))
    built = st.builds(
        lambda changed: rollout_body(fields, tensors | changed),
        st.dictionaries(names, arrays, min_size=1, max_size=2),
    )
    sampling = st.dictionaries(
        st.sampled_from(("n", "temperature", "top_p", "top_k", "max_tokens", "seed", "support_k")),
        st.sampled_from(HOSTILE) | numbers | st.floats(),
    )
    sampled = sampling.map(
        lambda more: rollout_body(fields | {"sampling": {"max_tokens": 9, "n": 1} | more}, tensors)
    )
    asked = reshaped(fields).map(lambda changed: rollout_body(changed, tensors))
    deep = st.just(save(tensors, {"format": ROLLOUT_FORMAT, "request": "[" * 100_000}))

    def check(body: bytes) -> None:
        require_refusal_or_answer(rollouts.post("/generate", content=body, headers=OCTETS))
        again = rollouts.post("/generate", content=good, headers=OCTETS)
        assert again.content == expected.content, again.text

    fuzz(check, built | sampled | asked | deep | damaged(good), examples=examples)


@shares(15)
def test_weights(examples: int, rollouts: TestClient) -> None:
    """A refused message changes nothing; one whose checksum is right is no exception."""
    good = message(3)
    size = int.from_bytes(good[DIGEST_BYTES : DIGEST_BYTES + 8], "little")
    header = json.loads(good[-size:])
    held = rollouts.get("/info").json()["receiver"]
    assert held["version"] == 3

    def signed(changed: Any) -> bytes:
        raw = json.dumps(changed).encode()
        rest = len(raw).to_bytes(8, "little") + good[DIGEST_BYTES + 8 : -size] + raw
        return hashed(rest)

    later = header | {"version": 4}

    def check(body: bytes) -> None:
        answer = rollouts.post("/weights", content=body, headers=OCTETS)
        if require_refusal_or_answer(answer) and answer.json()["refused"] is None:
            read_message(body)  # what is taken is sound
            rollouts.post("/weights", content=hashed_version(good, size, 3), headers=OCTETS)
        else:
            assert rollouts.get("/info").json()["receiver"]["version"] is not None

    resigned = damaged(good[DIGEST_BYTES:]).map(hashed)
    fuzz(check, reshaped(later).map(signed) | resigned | damaged(good), examples=examples)


def hashed(rest: bytes) -> bytes:
    import hashlib

    return hashlib.sha256(rest).digest() + rest


def hashed_version(good: bytes, size: int, version: int) -> bytes:
    raw = json.dumps(json.loads(good[-size:]) | {"version": version}).encode()
    return hashed(len(raw).to_bytes(8, "little") + good[DIGEST_BYTES + 8 : -size] + raw)
