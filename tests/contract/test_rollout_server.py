"""A rollout server generates what an engine in this process does, and recovers from being killed."""

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import numpy as np
import pytest
import torch
from safetensors.numpy import save
from safetensors.torch import load_file

from opd.config.arguments import as_arguments
from opd.config.rollout import RolloutBackend, RolloutServerConfig, VllmEngineConfig
from opd.config.student import DType
from opd.rollout.client import NAME, REMEDY, ServerRollouts
from opd.rollout.vllm import VllmRollouts, start_llm
from opd.rollout.wire import TOKEN_VARIABLE
from opd.serving.child import RunningService, running_service
from opd.serving.client import ServiceClient
from opd.sync.colocated import VllmWeights
from opd.sync.remote import ServerWeights
from opd.sync.sender import WeightSender
from opd.tracking.console import SilentProgress
from opd.types import FinishReason, Prompt, Rollout, Sampling
from opd.world import World

WORLD = World(rank=0, size=1, local_rank=0, device=torch.device("cpu"))
MAX_LENGTH = 64
STOP = [1]


def command(model: Path, **changed) -> list[str]:
    small = {
        "dtype": DType.float32,
        "max_model_len": MAX_LENGTH,
        "kv_cache_memory_bytes": 32 << 20,
    }
    config = RolloutServerConfig(model=str(model), **(small | changed))
    return ["-m", "opd.run.serve", "rollout", *as_arguments(config)]


@pytest.fixture(scope="module")
def server(quickstart: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningService]:
    log = tmp_path_factory.mktemp("log") / "rollout.log"
    with running_service(
        "rollout server",
        command(quickstart / "student"),
        variable=TOKEN_VARIABLE,
        log_path=log,
        environment={"OMP_NUM_THREADS": "1"},
        wait_s=300,
    ) as running:
        yield running


def service(url: str, token: str | None, retries: int = 8) -> ServiceClient:
    return ServiceClient(url, name=NAME, remedy=REMEDY, token=token, timeout=600, retries=retries)


def connected(client: ServiceClient) -> tuple[ServerRollouts, ServerWeights]:
    sender = WeightSender(dtype=torch.float32, snapshot_every=50)
    engine = ServerRollouts(client, run=sender.run, progress=SilentProgress())
    return engine, ServerWeights([client], sender, mark=engine.mark, world=WORLD)


def prompts() -> list[Prompt]:
    draw = np.random.default_rng(0)
    return [
        Prompt(uid=f"p{i}", token_ids=draw.integers(4, 20, 5 + i).astype(np.int32), answer="a")
        for i in range(6)
    ]


def read_weights(quickstart: Path) -> dict[str, torch.Tensor]:
    found = load_file(quickstart / "student" / "model.safetensors")
    return {name: t.float() for name, t in found.items() if name != "lm_head.weight"}


def disturb(weights: dict[str, torch.Tensor], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for tensor in weights.values():
        moved = torch.rand(tensor.shape, generator=generator) < 0.03
        tensor += torch.randn(tensor.shape, generator=generator) * 0.1 * moved


def test_the_server_generates_what_an_engine_in_this_process_does(
    server: RunningService, quickstart: Path
) -> None:
    engine, sync = connected(service(server.url, server.token))
    llm = start_llm(
        str(quickstart / "student"),
        VllmEngineConfig(kv_cache_memory_bytes=32 << 20),
        dtype=DType.float32,
        max_model_len=MAX_LENGTH,
        seed=0,
        sleeps=False,
        device=torch.device("cpu"),
    )
    stop_ids = service(server.url, server.token).send("GET", "/info").json()["stop_ids"]
    local = VllmRollouts(llm, stop_ids=stop_ids, progress=SilentProgress(), sleeps=False)
    dense = VllmWeights(llm, wake=local.wake, mark=local.mark)
    weights = read_weights(quickstart)
    for version in (3, 4, 9):
        disturb(weights, version)
        sparse = sync.push(weights.items(), version)
        whole = dense.push(weights.items(), version)
        assert (sparse["sync/bytes"] < 0.3 * whole["sync/bytes"]) == (version > 3)
        sampling = Sampling(n=3, max_tokens=20, seed=version, support_k=4)
        for each in (sampling, Sampling(temperature=0, max_tokens=9)):
            one, two = engine.generate(prompts(), each), local.generate(prompts(), each)
            assert len(one) == len(two) == 6 * each.n
            for a, b in zip(one, two, strict=True):
                assert_same(a, b)
                assert a.version == version
                assert a.prompt.answer == "a"


def assert_same(a: Rollout, b: Rollout) -> None:
    assert (a.prompt.uid, a.sample, a.finish_reason) == (b.prompt.uid, b.sample, b.finish_reason)
    assert a.token_ids.tolist() == b.token_ids.tolist()
    assert a.logps.tobytes() == b.logps.tobytes()
    assert (a.support_ids is None) == (b.support_ids is None)
    if a.support_ids is not None and b.support_ids is not None:
        assert a.support_ids.tolist() == b.support_ids.tolist()
    assert isinstance(a.finish_reason, FinishReason)


def test_no_prompts_no_rollouts(server: RunningService) -> None:
    assert connected(service(server.url, server.token))[0].generate([], Sampling()) == []


def test_other_weights_than_those_requested_do_not_generate(server: RunningService) -> None:
    engine, _ = connected(service(server.url, server.token, retries=0))
    engine.mark(12)
    with pytest.raises(
        ConnectionError, match=r"requested is version 12 of run \w+, here is version"
    ):
        engine.generate(prompts(), Sampling(max_tokens=4))


def test_too_long_is_refused_with_both_lengths(server: RunningService, quickstart: Path) -> None:
    engine, sync = connected(service(server.url, server.token))
    sync.push(read_weights(quickstart).items(), 0)
    with pytest.raises(ValueError, match=r"can reach 70 tokens, this server takes 64"):
        engine.generate(prompts(), Sampling(max_tokens=60))


def test_endpoints_refuse_a_missing_token_a_wrong_type_and_a_malformed_body(
    server: RunningService,
) -> None:
    assert httpx.get(f"{server.url}/health").text == "ok"
    assert httpx.get(f"{server.url}/info").status_code == 401
    for path in ("/weights", "/generate"):
        assert httpx.post(f"{server.url}{path}", content=b"x").status_code == 401
    key = {"Authorization": f"Bearer {server.token}"}
    assert httpx.post(f"{server.url}/generate", content=b"x", headers=key).status_code == 415
    typed = key | {"Content-Type": "application/octet-stream"}
    malformed = {
        b"x" * 99: "at most 16777216 are read",
        save({"token_ids": np.zeros(3, np.int32)}): "the body is not an opd rollout request",
    }
    for body, reason in malformed.items():
        response = httpx.post(f"{server.url}/generate", content=body, headers=typed)
        assert response.status_code == 400
        assert reason in response.text
    response = httpx.post(f"{server.url}/weights", content=b"x" * 99, headers=typed)
    assert "checksum" in response.json()["refused"]


def test_a_server_killed_and_restarted_generates_the_same_rollouts(
    quickstart: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("opd.serving.client.MAX_BACKOFF_S", 0.5)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]

    def start() -> subprocess.Popen[bytes]:
        arguments = command(quickstart / "student", backend=RolloutBackend.transformers, port=port)
        return subprocess.Popen(
            [sys.executable, *arguments, "exit_with_parent=true"],
            env=os.environ | {TOKEN_VARIABLE: "secret"},
        )

    running = [start()]
    try:
        engine, sync = connected(service(f"http://127.0.0.1:{port}", "secret", retries=200))
        weights = read_weights(quickstart)
        sync.push(weights.items(), 0)
        disturb(weights, 1)
        sync.push(weights.items(), 1)
        sampling = Sampling(n=2, max_tokens=12)
        expected = engine.generate(prompts(), sampling)
        running[-1].send_signal(signal.SIGKILL)
        running[-1].wait()
        later = threading.Timer(1.0, lambda: running.append(start()))
        later.start()
        again = engine.generate(prompts(), sampling)
        later.join()
        for a, b in zip(expected, again, strict=True):
            assert_same(a, b)
        assert len(running) == 2
    finally:
        time.sleep(0.1)
        for process in running:
            process.kill()
            process.wait()
