"""One thread that owns the model and scores all waiting requests together."""

import queue
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field

import torch

from opd.teacher.backend import Backend
from opd.teacher.response import compute_hidden, score_request
from opd.teacher.wire import WireRequest, WireResponse


@dataclass(frozen=True, slots=True)
class _Job:
    request: WireRequest
    done: Future[WireResponse] = field(default_factory=Future)


class WorkQueue:
    """``submit`` from any thread; the model is built and used by one thread only.

    Requests that wait together share one backend call of up to ``max_waiting_tokens`` tokens, which
    bounds the memory for hidden states.
    """

    def __init__(self, build: Callable[[], Backend], *, max_waiting_tokens: int) -> None:
        self._jobs: queue.SimpleQueue[_Job] = queue.SimpleQueue()
        self._max_waiting_tokens = max_waiting_tokens
        self._built: Future[Backend] = Future()
        self._thread = threading.Thread(
            target=self._run, args=(build,), daemon=True, name="teacher"
        )
        self._thread.start()

    def backend(self) -> Backend:
        """Wait until the model is loaded; raises what loading raised."""
        return self._built.result()

    def submit(self, request: WireRequest) -> Future[WireResponse]:
        """The future response; the request must have passed ``require_answerable``."""
        job = _Job(request)
        self._jobs.put(job)
        return job.done

    def _run(self, build: Callable[[], Backend]) -> None:
        try:
            backend = build()
        except BaseException as error:  # the caller of ``backend`` raises it, SystemExit included
            self._built.set_exception(error)
            return
        self._built.set_result(backend)
        first = None
        while True:
            group, first = self._collect(first or self._jobs.get())
            _score_jobs(backend, group)

    def _collect(self, first: _Job) -> tuple[list[_Job], _Job | None]:
        """``first`` and the jobs waiting behind it, and the first job that does not fit, if any."""
        group, room = [first], self._max_waiting_tokens - len(first.request.token_ids)
        while True:
            try:
                job = self._jobs.get_nowait()
            except queue.Empty:
                return group, None
            room -= len(job.request.token_ids)
            if room < 0:
                return group, job
            group.append(job)


@torch.inference_mode()
def _score_jobs(backend: Backend, group: Sequence[_Job]) -> None:
    """Finish or fail every job; one that fails in the head does not affect the others."""
    try:
        states = compute_hidden(backend, [job.request for job in group])
    except Exception as error:
        for job in group:
            job.done.set_exception(error)
        return
    for job, hidden_ND in zip(group, states, strict=True):
        try:
            job.done.set_result(score_request(backend, job.request, hidden_ND))
        except Exception as error:
            job.done.set_exception(error)
