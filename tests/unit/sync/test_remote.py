"""200 pushes over HTTP into a process that is sent wrong messages, killed and restarted."""

import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import httpx
import pytest
import torch

from opd.serving.client import ServiceClient
from opd.sync.remote import ServerWeights
from opd.sync.replica import flat_bits
from opd.sync.sender import WeightSender
from opd.world import World
from tests.unit.sync.trained import mask, state, train

WORLD = World(rank=0, size=1, local_rank=0, device=torch.device("cpu"))
SCRIPT = Path(__file__).parent / "receiver_process.py"
Start = Callable[[int], subprocess.Popen[bytes]]


@pytest.fixture
def start() -> Iterator[Start]:
    """Starts receivers on a port; ends them all."""
    started: list[subprocess.Popen[bytes]] = []

    def run(port: int) -> subprocess.Popen[bytes]:
        started.append(
            subprocess.Popen([sys.executable, str(SCRIPT), f"port={port}", "exit_with_parent=true"])
        )
        return started[-1]

    yield run
    for process in started:
        process.kill()
        process.wait()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def client(port: int, retries: int = 8) -> ServiceClient:
    return ServiceClient(
        f"http://127.0.0.1:{port}",
        name="the receiver",
        remedy="start it",
        token="secret",
        timeout=300,
        retries=retries,
    )


class Lossy:
    """A client over an unreliable network: ``fault`` happens to the next message of weights."""

    def __init__(self, service: ServiceClient) -> None:
        self.service, self.url = service, service.url
        self.fault: str | None = None
        self.last = b""
        self.posts = 0
        self.kill: Callable[[], None] = lambda: None

    def send(
        self,
        method: str,
        path: str,
        body: bytes = b"",
        headers: Mapping[str, str] | None = None,
        *,
        retries: int | None = None,
    ) -> httpx.Response:
        if path != "/weights":
            return self.service.send(method, path, body, headers, retries=retries)
        self.posts += 1
        fault, self.fault = self.fault, None
        old, self.last = self.last, body
        if fault == "dropped":
            state = self.service.send("GET", "/info").json()["receiver"]
            return httpx.Response(200, json=state)
        if fault == "corrupted":
            body = body[:200] + bytes([body[200] ^ 1]) + body[201:]
        if fault == "repeated":
            self.service.send(method, path, body, headers)
        if fault == "reordered":
            late = self.service.send(method, path, old, headers).json()
            assert late["refused"] is None  # what it has already: nothing happens
            response = self.service.send(method, path, body, headers)
            late = self.service.send(method, path, old, headers).json()
            assert "goes from version" in late["refused"]
            return response
        if fault == "killed":
            self.kill()
        return self.service.send(method, path, body, headers)


def truth(weights: dict[str, torch.Tensor]) -> bytes:
    return b"".join(flat_bits(t).numpy().tobytes() for t in weights.values())


@pytest.mark.parametrize(("masked", "tied"), [(False, False), (True, True)])
def test_two_hundred_pushes_arrive_bit_for_bit(masked: bool, tied: bool, start: Start) -> None:
    port = free_port()
    processes = [start(port)]
    weights = state(tied=tied)
    kept = mask(weights, 0.3) if masked else None
    sender = WeightSender(
        dtype=torch.bfloat16, snapshot_every=90, kept=kept, fingerprint="m" if masked else None
    )
    lossy = Lossy(client(port))

    def kill() -> None:
        processes[-1].send_signal(signal.SIGKILL)
        processes[-1].wait()
        processes.append(start(port))

    lossy.kill = kill
    sync = ServerWeights([lossy], sender, mark=lambda version: None, world=WORLD)  # pyright: ignore
    faults = {20: "dropped", 40: "repeated", 60: "reordered", 80: "corrupted", 120: "killed"}
    full = len(truth(weights))
    posts = {}
    for version in range(200):
        if version:
            train(weights, 0.01 + 0.03 * (version % 10) / 9, version, kept)
        lossy.fault, lossy.posts = faults.get(version), 0
        metrics = sync.push(weights.items(), version)
        posts[version] = lossy.posts
        assert lossy.service.send("GET", "/state").content == truth(weights), version
        whole = version in (0, 90, 180, 80, 120)
        assert (metrics["sync/bytes"] > full) == whole, version
        assert metrics["sync/snapshots"] == float(version in (0, 90, 180))
        if version == 150 and masked:
            kill()
            wait_for(lossy.service, version)
            assert lossy.service.send("GET", "/state").content == truth(weights)
        assert version == 0 or 0 < metrics["sync/changed"] < 0.05
    with_index = {1, 121, 151} if masked else set()  # kept coordinates: once to each process
    assert {version for version, n in posts.items() if n > 1} == {20, 80, 120} | with_index
    assert len(processes) == (3 if masked else 2)


def wait_for(service: ServiceClient, version: int) -> None:
    """Until the receiver has ``version`` again, without a push."""
    deadline = time.monotonic() + 300
    while service.send("GET", "/info").json()["receiver"]["version"] != version:
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_a_receiver_that_stays_away_is_named_in_the_error() -> None:
    port = free_port()
    sender = WeightSender(dtype=torch.bfloat16, snapshot_every=50)
    sync = ServerWeights([client(port, retries=1)], sender, mark=lambda version: None, world=WORLD)
    with pytest.raises(ConnectionError, match=r"the receiver at .* failed 2 times .* start it"):
        sync.push(state(tied=True).items(), 0)


@pytest.mark.parametrize("body", [b"<html>", b"", b"[]", b'{"object": "list"}'])
def test_another_service_at_the_address_is_named_in_the_error(body: bytes) -> None:
    class Other(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["content-length"]))
            self.send_response(200)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            """Silence."""

    with HTTPServer(("127.0.0.1", 0), Other) as other:
        threading.Thread(target=other.handle_request, daemon=True).start()
        sender = WeightSender(dtype=torch.bfloat16, snapshot_every=50)
        servers = [client(other.server_port, retries=0)]
        sync = ServerWeights(servers, sender, mark=lambda version: None, world=WORLD)
        with pytest.raises(ValueError, match=r"/weights returned .* not the state of a rollout"):
            sync.push(state(tied=True).items(), 0)
