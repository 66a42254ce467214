"""What a server refuses before it works: foreign hosts, web pages, bodies and weights that do not fit."""

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import pytest
import torch
import uvicorn
from fastapi.testclient import TestClient
from safetensors.numpy import save

from opd.config.arguments import as_arguments, parse_arguments
from opd.config.teacher import TeacherServerConfig
from opd.rollout.wire import read_response as read_rollouts
from opd.serving import connections, waiting
from opd.serving.app import MEDIA_TYPE, bare_app
from opd.serving.connections import BoundedServer
from opd.serving.hosts import HostCheck
from opd.serving.waiting import BoundedResponse
from opd.sync.receiver import WeightReceiver
from opd.sync.sender import WeightSender
from opd.teacher.answer import require_answer
from opd.teacher.wire import (
    Want,
    WireRequest,
    read_response,
    request_bytes,
)
from opd.types import Prompt, Sampling
from tests.support.stub_teacher import VOCAB
from tests.support.teacher_apps import stub_app

SOON_S = 60.0


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("127.0.0.1", 200),
        ("127.0.0.1:8000", 200),
        ("127.9.9.9:1", 200),
        ("localhost:8000", 200),
        ("LocalHost", 200),
        ("[::1]:8000", 200),
        ("node7.cluster:8000", 200),
        ("evil.example", 403),
        ("evil.example:8000", 403),
        ("127.0.0.1.evil.example", 403),
        ("localhost.evil.example", 403),
        ("10.0.0.1:8000", 403),
        ("[::2]", 403),
        ("", 403),
        ("[", 403),
        ("evil\u00e9".encode("latin-1").decode("latin-1"), 403),
    ],
)
def test_a_service_without_a_token_answers_to_its_own_names_only(host: str, status: int) -> None:
    client = TestClient(HostCheck(bare_app("test"), ["Node7.cluster"]))
    answer = client.get("/health", headers={"host": host.encode("latin-1")})
    assert answer.status_code == status, answer.text
    if status == 403:
        assert "allowed_hosts" in answer.text


def test_a_web_page_gets_no_answer_without_a_token() -> None:
    client = TestClient(HostCheck(bare_app("test"), []), base_url="http://localhost")
    assert client.get("/health").status_code == 200
    for origin in ("http://evil.example", "null", "http://localhost:3000"):
        assert client.get("/health", headers={"origin": origin}).status_code == 403


def test_allowed_hosts_reach_a_server_that_is_started() -> None:
    config = TeacherServerConfig(model="m", allowed_hosts=["node7", "a.b"])
    assert parse_arguments(TeacherServerConfig, as_arguments(config)) == config
    assert "allowed_hosts" not in " ".join(as_arguments(TeacherServerConfig(model="m")))


@pytest.mark.parametrize("query", ["", "?start=a&stop=b", "?start=1", "?start=0&stop=1"])
def test_the_head_is_refused_without_a_token_before_its_parameters_are_read(query: str) -> None:
    client = TestClient(stub_app("secret"))
    assert client.get(f"/head{query}").status_code == 401
    answer = client.get(f"/head{query}", headers={"authorization": "Bearer secret"})
    assert answer.status_code == (200 if "stop=1" in query else 400)


def score_request(**changed: object) -> WireRequest:
    request = WireRequest(
        token_ids=np.array([1, 2, 3, 4], np.int32),
        lengths=np.array([4], np.int32),
        starts=np.array([2], np.int32),
        vocab_size=VOCAB,
    )
    return replace(request, **changed)


@pytest.mark.parametrize(
    "changed",
    [
        {"named_ids": np.zeros((2, 0), np.int32)},
        {"temperature": 1e-300},
        {"temperature": 1e-4},
        {"temperature": 1e300},
        {"temperature": float("inf")},
    ],
)
def test_a_score_request_without_a_possible_answer_is_refused(changed: dict) -> None:
    client = TestClient(stub_app())
    body = request_bytes(score_request(**changed))
    answer = client.post("/score", content=body, headers={"content-type": MEDIA_TYPE})
    assert answer.status_code == 400, answer.text
    assert next(iter(changed)) in answer.text


def scores(rows: int, width: int = 0, **more: np.ndarray) -> bytes:
    arrays = {"logps": np.zeros(rows, np.float32)}
    if width:
        arrays["support_ids"] = np.zeros((rows, width), np.int32)
        arrays["support_logps"] = np.zeros((rows, width), np.float32)
        arrays["support_tail"] = np.zeros(rows, np.float32)
    return save(arrays | more)


@pytest.mark.parametrize(
    ("request_", "body", "reason"),
    [
        (score_request(), scores(3), r"logps is \[3\], expected \[2\]"),
        (score_request(), scores(0), r"logps is \[0\], expected \[2\]"),
        (score_request(top_k=3), scores(2), r"support_ids is absent, expected \[2, 3\]"),
        (score_request(top_k=3), scores(2, 2), r"support_ids is \[2, 2\], expected \[2, 3\]"),
        (score_request(want=Want.full_logps), scores(2), "full_logps is absent"),
        (score_request(want=Want.hidden), scores(2), "hidden is absent"),
        (
            score_request(want=Want.hidden),
            scores(2, hidden=np.zeros((1, 4), np.float32)),
            r"hidden is \[1, 4\]",
        ),
        (score_request(), scores(2, outside=np.zeros(5, np.float32)), r"outside is \[5\]"),
    ],
)
def test_an_answer_of_another_size_is_one_sentence(
    request_: WireRequest, body: bytes, reason: str
) -> None:
    with pytest.raises(ValueError, match=reason):
        require_answer(read_response(body), request_)


@pytest.mark.parametrize(
    ("name", "array"),
    [
        ("lengths", np.array([1], np.int32)),
        ("lengths", np.array([0, 3], np.int32)),
        ("lengths", np.array([-1, 4], np.int32)),
        ("token_ids", np.zeros(2, np.int32)),
        ("token_ids", np.zeros(3, np.int64)),
        ("logps", np.zeros((3, 1), np.float32)),
        ("logps", np.array([0.0, np.nan, 0.0], np.float32)),
        ("samples", np.zeros(1, np.int32)),
        ("support_ids", np.zeros((2, 4), np.int32)),
    ],
)
def test_completions_of_another_size_are_one_sentence(name: str, array: np.ndarray) -> None:
    good = {
        "token_ids": np.zeros(3, np.int32),
        "lengths": np.array([1, 2], np.int32),
        "logps": np.zeros(3, np.float32),
        "stopped": np.zeros(2, np.uint8),
        "samples": np.arange(2, dtype=np.int32),
        "versions": np.zeros(2, np.int64),
    }
    prompts = [Prompt(uid="p", token_ids=np.array([1], np.int32))]
    assert len(read_rollouts(save(good), prompts, Sampling(n=2))) == 2
    with pytest.raises(ValueError, match=r"expected|no token|not finite"):
        read_rollouts(save(good | {name: array}), prompts, Sampling(n=2))


def snapshot(weights: dict[str, torch.Tensor], version: int) -> bytes:
    sender = WeightSender(dtype=torch.float32, snapshot_every=1, run="r")
    sender.prepare(weights.items(), version)
    message = sender.next_for(WeightReceiver(lambda *_: None).state())
    assert message is not None
    return message


@pytest.mark.parametrize(
    ("name", "shape", "reason"),
    [("other", (2, 3), "the engine has no such weight"), ("w", (3, 2), r"one of shape \[2, 3\]")],
)
def test_a_snapshot_of_other_weights_is_refused_and_the_held_ones_stay(
    name: str, shape: tuple[int, ...], reason: str
) -> None:
    loads: list[int] = []
    receiver = WeightReceiver(
        lambda tensors, changes, version: loads.append(version), {"w": (2, 3)}
    )
    assert receiver.take(snapshot({"w": torch.ones(2, 3)}, 1)).version == 1
    state = receiver.take(snapshot({name: torch.zeros(shape)}, 2))
    assert reason.replace("\\", "") in (state.refused or "")
    assert (state.version, loads) == (1, [1])
    assert torch.equal(receiver.tensors()["w"], torch.ones(2, 3))


@contextmanager
def running(server: BoundedServer) -> Iterator[int]:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(8)
        thread = threading.Thread(target=server.run, args=([listener],), daemon=True)
        thread.start()
        yield listener.getsockname()[1]
        server.should_exit = True
        thread.join(SOON_S)


def test_a_client_that_reads_no_response_is_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(waiting, "CHUNK_S", 0.5)
    monkeypatch.setattr(connections, "CLOSING_S", 0.5)
    app = bare_app("test")

    @app.get("/large")
    async def large() -> BoundedResponse:
        return BoundedResponse(bytes(64 << 20))

    server = BoundedServer(
        uvicorn.Config(app, log_config=None, ws="none", lifespan="off"), max_connections=4
    )
    with running(server) as port, socket.create_connection(("127.0.0.1", port)) as link:
        link.sendall(b"GET /large HTTP/1.1\r\nHost: localhost\r\n\r\n")
        until = time.monotonic() + SOON_S
        while not server.server_state.connections:
            assert time.monotonic() < until
            time.sleep(0.05)
        while server.server_state.connections:
            assert time.monotonic() < until, "the connection is still held"
            time.sleep(0.1)
