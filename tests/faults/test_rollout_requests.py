"""A malformed request to a rollout server gets one sentence and hurts no other request."""

import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
from fastapi.testclient import TestClient
from safetensors.numpy import save

from opd.rollout.app import EngineHost, ServedModel, rollout_app
from opd.rollout.wire import FORMAT, read_response
from opd.types import FinishReason, Prompt, ReceiverState, Rollout, Sampling

VOCAB = 100
IDS = np.array([4, 5, 6, 7], np.int32)


class OneTokenEngine:
    """Writes one token for each sample, and dies of what a real engine dies of."""

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[Rollout]:
        assert sampling.n > 0
        assert all(p.token_ids.max() < VOCAB for p in prompts)
        return [
            Rollout(
                prompt=prompt,
                token_ids=prompt.token_ids[:1],
                logps=np.zeros(1, np.float32),
                finish_reason=FinishReason.stop,
                version=3,
                sample=sample,
            )
            for prompt in prompts
            for sample in range(sampling.n)
        ]


@pytest.fixture(scope="module")
def client() -> TestClient:
    state = ReceiverState(run="r", version=3)
    host = EngineHost(
        engine=OneTokenEngine(),
        model=ServedModel(
            model="m", dtype="float32", max_length=64, vocab_size=VOCAB, stop_ids=[1]
        ),
        take=lambda body: state,
        state=lambda: state,
    )
    return TestClient(rollout_app(lambda: host, token=None, max_request_bytes=1 << 20))


def body(
    token_ids: Any = IDS,
    lengths: Any = (4,),
    uids: Any = ("p",),
    run: Any = "r",
    version: Any = 3,
    **sampling: Any,
) -> bytes:
    fields = {"uids": uids, "sampling": sampling, "run": run, "version": version}
    arrays = {"token_ids": np.asarray(token_ids), "lengths": np.asarray(lengths, np.int32)}
    return save(arrays, {"format": FORMAT, "request": json.dumps(fields)})


def post(client: TestClient, content: bytes) -> Any:
    return client.post(
        "/generate", content=content, headers={"content-type": "application/octet-stream"}
    )


MALFORMED: dict[str, Callable[[], bytes]] = {
    "n=0": lambda: body(n=0),
    "n=-1": lambda: body(n=-1),
    "n=2^40": lambda: body(n=1 << 40),
    "n=true": lambda: body(n=True),
    "n=1.5": lambda: body(n=1.5),
    "n='3'": lambda: body(n="3"),
    "n=null": lambda: body(n=None),
    "an id outside the vocabulary": lambda: body(token_ids=np.array([4, 5, 6, VOCAB], np.int32)),
    "a negative id": lambda: body(token_ids=np.array([4, -1, 6, 7], np.int32)),
    "seed=2^80": lambda: body(seed=1 << 80),
    "seed=-1": lambda: body(seed=-1),
    "temperature=nan": lambda: body(temperature=float("nan")),
    "temperature=inf": lambda: body(temperature=float("inf")),
    "temperature=-1": lambda: body(temperature=-1.0),
    "temperature=[]": lambda: body(temperature=[]),
    "top_p=0": lambda: body(top_p=0.0),
    "top_p=1.5": lambda: body(top_p=1.5),
    "top_k=0": lambda: body(top_k=0),
    "top_k=-2": lambda: body(top_k=-2),
    "max_tokens=0": lambda: body(max_tokens=0),
    "max_tokens beyond the model": lambda: body(max_tokens=61),
    "support_k beyond the vocabulary": lambda: body(support_k=VOCAB + 1, max_tokens=9),
    "support_k=-1": lambda: body(support_k=-1),
    "an unknown field": lambda: body(logit_bias={"3": 1e9}),
    "version=null": lambda: body(version=None),
    "version=2^90": lambda: body(version=1 << 90),
    "version='3'": lambda: body(version="3"),
    "null uids": lambda: body(uids=(None,)),
    "uids as a text": lambda: body(uids="p"),
    "too many uids": lambda: body(uids=("p", "q")),
    "no prompt": lambda: body(lengths=(), uids=()),
    "an empty prompt": lambda: body(lengths=(4, 0), uids=("p", "q")),
    "lengths in two dimensions": lambda: body(lengths=((4,),)),
    "lengths that do not add up": lambda: body(lengths=(3,)),
    "lengths that overflow": lambda: body(lengths=(2**31 - 1, 2**31 - 1), uids=("p", "q")),
    "float ids": lambda: body(token_ids=IDS.astype(np.float32)),
    "ids in two dimensions": lambda: body(token_ids=IDS.reshape(2, 2)),
    "no body": lambda: b"",
    "noise": lambda: bytes(range(256)) * 4,
    "a header longer than the body": lambda: (1 << 20).to_bytes(8, "little") + b"{}",
    "a body cut short": lambda: body()[:-3],
}


@pytest.mark.parametrize("name", MALFORMED)
def test_a_malformed_request_gets_a_sentence(client: TestClient, name: str) -> None:
    answer = post(client, MALFORMED[name]())
    assert answer.status_code == 400, answer.text
    assert 10 < len(answer.text) < 400
    assert "\n" not in answer.text
    assert client.get("/health").text == "ok"
    sampling = Sampling(n=2, max_tokens=9)
    good = post(client, body(n=2, max_tokens=9))
    assert good.status_code == 200, good.text
    rollouts = read_response(good.content, [Prompt(uid="p", token_ids=IDS)], sampling)
    assert [r.token_ids.tolist() for r in rollouts] == [[4], [4]]


class FailingEngine(OneTokenEngine):
    """Raises where it is told to: ``broken`` for every prompt, or for those of one id."""

    def __init__(self) -> None:
        self.broken = False

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[Rollout]:
        if self.broken or any(p.token_ids[0] == 66 for p in prompts):
            raise RuntimeError("an illegal memory access")
        return super().generate(prompts, sampling)


@pytest.mark.parametrize("broken", [False, True])
def test_an_engine_that_failed_is_checked_and_a_broken_one_ends_its_server(broken: bool) -> None:
    engine, sentences = FailingEngine(), list[str]()
    state = ReceiverState(run="r", version=3)
    host = EngineHost(
        engine=engine,
        model=ServedModel(
            model="m", dtype="float32", max_length=64, vocab_size=VOCAB, stop_ids=[1]
        ),
        take=lambda body: state,
        state=lambda: state,
    )
    application = rollout_app(
        lambda: host, token=None, max_request_bytes=1 << 20, leave=sentences.append
    )
    client = TestClient(application)
    assert client.get("/health").status_code == 200
    engine.broken = broken
    bad = post(client, body(token_ids=np.array([66, 5, 6, 7], np.int32), max_tokens=9))
    assert bad.status_code == 500
    after = post(client, body(max_tokens=9))  # behind the check, in the engine's thread
    assert after.status_code == (500 if broken else 200)
    assert client.get("/health").status_code == (503 if broken else 200)
    assert bool(sentences) == broken
    for sentence in sentences:
        assert "does not generate any more (RuntimeError: an illegal memory access)" in sentence
        assert "\n" not in sentence


def test_a_server_whose_engine_is_broken_leaves_with_1_and_one_sentence() -> None:
    code = "from opd.rollout.app import leave_process; leave_process('the engine failed')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr == "opd rollout: the engine failed\n"
