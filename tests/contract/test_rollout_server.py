"""A rollout server writes what an engine in this process writes, and lives through being killed."""

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
from opd.rollout.options import TOKEN_VARIABLE, EngineName, RolloutServerOptions
from opd.serving.options import arguments_of
from safetensors.torch import load_file

from opd.config.student import DType
from opd.rollout.client import REMEDY, WHAT, ServerRollouts
from opd.rollout.vllm import VllmRollouts, VllmSettings, start_llm
from opd.serving.child import RunningService, running_service
from opd.serving.client import ServiceClient
from opd.sync.colocated import VllmWeights
from opd.sync.remote import ServerWeights
from opd.sync.sparse import WeightSender
from opd.tracking.console import SilentProgress
from opd.types import FinishReason, Prompt, Rollout, Sampling
from opd.world import World

WORLD = World(rank=0, size=1, local_rank=0, device=torch.device("cpu"))
MAX_LENGTH = 64
STOP = [1]


def options(model: Path, **changed) -> RolloutServerOptions:
    told = {"dtype": DType.float32, "max_length": MAX_LENGTH, "kv_cache_mib": 32}
    return RolloutServerOptions(model=str(model), **(told | changed))


def command(model: Path, **changed) -> list[str]:
    return ["-m", "opd.run.serve", *arguments_of(options(model, **changed))]


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
    return ServiceClient(url, what=WHAT, remedy=REMEDY, token=token, timeout=120, retries=retries)


def connected(client: ServiceClient) -> tuple[ServerRollouts, ServerWeights]:
    sender = WeightSender(dtype=torch.float32, anchor_every=50)
    engine = ServerRollouts(client, run=sender.run, progress=SilentProgress())
    return engine, ServerWeights([client], sender, mark=engine.mark, world=WORLD)


def prompts() -> list[Prompt]:
    draw = np.random.default_rng(0)
    return [
        Prompt(uid=f"p{i}", token_ids=draw.integers(4, 20, 5 + i).astype(np.int32), answer="a")
        for i in range(6)
    ]


def weights_of(quickstart: Path) -> dict[str, torch.Tensor]:
    found = load_file(quickstart / "student" / "model.safetensors")
    return {name: t.float() for name, t in found.items() if name != "lm_head.weight"}


def disturb(weights: dict[str, torch.Tensor], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for tensor in weights.values():
        moved = torch.rand(tensor.shape, generator=generator) < 0.03
        tensor += torch.randn(tensor.shape, generator=generator) * 0.1 * moved


def test_the_server_writes_what_an_engine_in_this_process_writes(
    server: RunningService, quickstart: Path
) -> None:
    engine, sync = connected(service(server.url, server.token))
    settings = VllmSettings(
        model=str(quickstart / "student"),
        dtype="float32",
        max_length=MAX_LENGTH,
        seed=0,
        gpu_memory_fraction=0.3,
        kv_cache_mib=32,
        eager=True,
        sleep=False,
        trust_remote_code=False,
    )
    llm = start_llm(settings, torch.device("cpu"))
    stop_ids = service(server.url, server.token).send("GET", "/info").json()["stop_ids"]
    local = VllmRollouts(llm, stop_ids=stop_ids, progress=SilentProgress(), sleeps=False)
    dense = VllmWeights(llm, wake=local.wake, mark=local.mark)
    weights = weights_of(quickstart)
    for version in (3, 4, 9):
        disturb(weights, version)
        told = sync.push(weights.items(), version)
        whole = dense.push(weights.items(), version)
        assert (told["sync/bytes"] < 0.3 * whole["sync/bytes"]) == (version > 3)
        sampling = Sampling(n=3, max_tokens=20, seed=version, support_k=4)
        for asked in (sampling, Sampling(temperature=0, max_tokens=9)):
            one, two = engine.generate(prompts(), asked), local.generate(prompts(), asked)
            assert len(one) == len(two) == 6 * asked.n
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


def test_other_weights_than_those_asked_for_do_not_write(server: RunningService) -> None:
    engine, _ = connected(service(server.url, server.token, retries=0))
    engine.mark(12)
    with pytest.raises(ConnectionError, match=r"asked for version 12 of run \w+, here is version"):
        engine.generate(prompts(), Sampling(max_tokens=4))


def test_too_long_is_refused_with_a_sentence(server: RunningService, quickstart: Path) -> None:
    engine, sync = connected(service(server.url, server.token))
    sync.push(weights_of(quickstart).items(), 0)
    with pytest.raises(ValueError, match=r"can reach 70 tokens, this server takes 64"):
        engine.generate(prompts(), Sampling(max_tokens=60))


def test_doors_are_shut_without_token_type_or_sense(server: RunningService) -> None:
    assert httpx.get(f"{server.url}/health").text == "ok"
    assert httpx.get(f"{server.url}/info").status_code == 401
    for path in ("/weights", "/generate"):
        assert httpx.post(f"{server.url}{path}", content=b"x").status_code == 401
    key = {"Authorization": f"Bearer {server.token}"}
    assert httpx.post(f"{server.url}/generate", content=b"x", headers=key).status_code == 415
    typed = key | {"Content-Type": "application/octet-stream"}
    said = httpx.post(f"{server.url}/generate", content=b"x" * 99, headers=typed)
    assert said.status_code == 400
    said = httpx.post(f"{server.url}/weights", content=b"x" * 99, headers=typed)
    assert "checksum" in said.json()["refused"]


def test_a_server_killed_while_a_run_wants_rollouts_comes_back_and_they_are_the_same(
    quickstart: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("opd.serving.client.LONGEST_PAUSE_S", 0.5)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]

    def start() -> subprocess.Popen[bytes]:
        arguments = command(quickstart / "student", engine=EngineName.transformers, port=port)
        return subprocess.Popen(
            [sys.executable, *arguments, "--exit-with-parent"],
            env=os.environ | {TOKEN_VARIABLE: "secret"},
        )

    running = [start()]
    try:
        engine, sync = connected(service(f"http://127.0.0.1:{port}", "secret", retries=200))
        weights = weights_of(quickstart)
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
