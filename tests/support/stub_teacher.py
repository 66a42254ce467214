"""A teacher server whose back end sleeps a fixed time per token and counts what it computes.

    python -m tests.support.stub_teacher model=TOKENS_PER_SECOND [key=value ...]

Everything but the back end is a teacher server's own. ``GET /stub`` tells what it has done. With
STUB_EVENTS in the environment it appends a line for every event to that file.
"""

import os
import sys
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse

from opd.config.arguments import parse_arguments
from opd.config.teacher import TeacherServerConfig
from opd.head import HeadSpec
from opd.serving.child import RunningService, running_service
from opd.serving.server import serve
from opd.teacher.app import teacher_app
from opd.teacher.vocabulary import Vocabulary
from opd.teacher.work_queue import WorkQueue
from opd.types import FinishReason, IntArray, Prompt, Rollout, TeacherInfo

VOCAB, WIDTH, MAX_LENGTH = 80, 64, 1 << 16
TOKEN, VARIABLE = "secret", "OPD_TEACHER_TOKEN"
EVENTS = "STUB_EVENTS"
DIGITS = 3
STUDENT = Vocabulary(fingerprint="f", tokenizer_size=VOCAB, matrix_size=VOCAB)
MAX_CONNECTIONS = 300


def numbered(number: int, length: int) -> Rollout:
    """A rollout of ``length`` tokens, prompt included, that the stub recognises."""
    random = np.random.default_rng(number)
    digits = [number // VOCAB**power % VOCAB for power in range(DIGITS)]
    return Rollout(
        prompt=Prompt(uid=f"{number}", token_ids=np.array(digits, np.int32)),
        token_ids=random.integers(0, VOCAB, length - DIGITS).astype(np.int32),
        logps=np.zeros(length - DIGITS, np.float32),
        finish_reason=FinishReason.length,
        version=0,
    )


def of_teacher(rollout: Rollout, name: str) -> Rollout:
    """The rollout with a prompt that names its teacher."""
    return replace(rollout, prompt=replace(rollout.prompt, teacher=name))


def running_stub(
    rate: float, log: Path, **settings: object
) -> AbstractContextManager[RunningService]:
    """A stub server on a free port; events go where STUB_EVENTS of this process says."""
    words = [f"model={rate}", *(f"{name}={value}" for name, value in settings.items())]
    return running_service(
        "stub teacher",
        ["-m", "tests.support.stub_teacher", *words],
        variable=VARIABLE,
        token=TOKEN,
        log_path=log,
        environment={"OMP_NUM_THREADS": "1"},
        wait_s=300,
    )


def log_event(text: str) -> None:
    """A line with the time, which all processes of a machine share; written at once and whole."""
    if EVENTS in os.environ:
        with Path(os.environ[EVENTS]).open("a") as file:
            file.write(f"{time.monotonic():.6f} {text}\n")


class StubBackend:
    """Hidden states are rows of a random matrix; asleep, matrix and head are NaN."""

    info = TeacherInfo(
        model="stub",
        vocab_size=VOCAB,
        hidden_size=WIDTH,
        tokenizer_fingerprint="f",
        tokenizer_size=VOCAB,
        max_length=MAX_LENGTH,
    )
    spec = HeadSpec(vocab_size=VOCAB)

    def __init__(self, tokens_per_second: float) -> None:
        self._seconds = 1 / tokens_per_second
        random = torch.Generator().manual_seed(3)
        self._stored = torch.randn(2, VOCAB, WIDTH, generator=random).bfloat16().float()
        self._embedding_VD, self.head_VD = self._stored.clone()
        self.computed: Counter[int] = Counter()
        self.tokens = 0

    def hidden(self, sequences: Sequence[IntArray]) -> list[torch.Tensor]:
        """Takes the time of one token for each token, the last of each sequence included."""
        for sequence in sequences:
            digits = sequence[:DIGITS].astype(int).tolist()
            self.computed[sum(d * VOCAB**power for power, d in enumerate(digits))] += 1
        tokens = sum(len(sequence) + 1 for sequence in sequences)
        self.tokens += tokens
        log_event(f"score {len(sequences)}")
        time.sleep(tokens * self._seconds)
        log_event("scored")
        return [self._embedding_VD[torch.from_numpy(s.astype(np.int64))] for s in sequences]

    def sleep(self) -> None:
        self._embedding_VD.fill_(torch.nan)
        self.head_VD.fill_(torch.nan)
        log_event("sleep")

    def wake(self) -> None:
        log_event("wake")
        self._embedding_VD.copy_(self._stored[0])
        self.head_VD.copy_(self._stored[1])


def main() -> None:
    """Serve as the key=value words of the command line say."""
    config = parse_arguments(TeacherServerConfig, sys.argv[1:])
    backend = StubBackend(float(config.model))
    paths: Counter[str] = Counter()

    def make_app() -> FastAPI:
        work = WorkQueue(
            lambda: backend,
            max_waiting_tokens=config.max_waiting_tokens,
            max_held_bytes=config.max_response_bytes,
            sleeps=config.sleep,
        )
        app = teacher_app(work, config, token=TOKEN)

        @app.get("/stub")
        async def stub() -> JSONResponse:
            return JSONResponse(
                {"computed": backend.computed, "tokens": backend.tokens, "paths": paths}
            )

        async def counting(scope, receive, send):  # raw ASGI: a middleware would wrap ``receive``
            if scope["type"] == "http":
                paths[Request(scope).url.path] += 1
            await app(scope, receive, send)

        return counting

    serve(make_app, config, token=TOKEN, variable=VARIABLE, max_connections=MAX_CONNECTIONS)


if __name__ == "__main__":
    main()
