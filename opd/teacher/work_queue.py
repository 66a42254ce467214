"""One thread that owns the model and scores all waiting requests together."""

import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch

from opd.teacher.backend import Backend, ServerBackend
from opd.teacher.response import compute_hidden, score_request
from opd.teacher.wire import WireRequest, WireResponse
from opd.timing import span

Result = TypeVar("Result")


@dataclass(eq=False, slots=True)
class ScoreJob:
    """A request, the size of its response, and the response; ``held`` are bytes of it that are in memory."""

    request: WireRequest
    size: int
    done: Future[WireResponse] = field(default_factory=Future)
    held: int = 0


@dataclass(eq=False, frozen=True, slots=True)
class _Call:
    """Something to do with the model between two groups of requests; ``wakes``: it needs it awake."""

    function: Callable[[ServerBackend], Any]
    wakes: bool
    done: Future[Any] = field(default_factory=Future)


class WorkQueue:
    """``submit`` from any thread; the model is built and used by one thread only, in order of arrival.

    Requests that wait together share one backend call of up to ``max_waiting_tokens`` tokens, which
    bounds the memory for hidden states. Nothing is computed while ``max_held_bytes`` of responses wait to
    be sent, except one that is alone. A request whose future is cancelled before its turn is not computed.

    With ``sleeps`` the model is put to sleep when it is loaded and by ``sleep``, and woken by ``wake`` and
    by any request: whoever needs it gets it, awake.
    """

    def __init__(
        self,
        build: Callable[[], ServerBackend],
        *,
        max_waiting_tokens: int,
        max_held_bytes: int = 1 << 30,
        sleeps: bool = False,
    ) -> None:
        self.sleeps = sleeps
        self._waiting: deque[ScoreJob | _Call] = deque()
        self._changed = threading.Condition()
        self._held = 0
        self._is_asleep = False
        self._max_waiting_tokens = max_waiting_tokens
        self._max_held_bytes = max_held_bytes
        self._built: Future[ServerBackend] = Future()
        self._thread = threading.Thread(
            target=self._run, args=(build,), daemon=True, name="teacher"
        )
        self._thread.start()

    def backend(self) -> ServerBackend:
        """Wait until the model is loaded; raises what loading raised. For its ``info`` and ``spec`` only."""
        return self._built.result()

    def submit(self, request: WireRequest, size: int = 0) -> ScoreJob:
        """A job with the future response, of ``size`` bytes; ``release`` it when the response is sent.

        The request must have passed ``require_answerable``.
        """
        job = ScoreJob(request, size)
        self._put(job)
        return job

    def release(self, job: ScoreJob) -> None:
        """The response has been sent, or will not be: it is cancelled, or freed once it is computed."""
        job.done.cancel()
        job.done.add_done_callback(lambda _: self._free(job))

    def call(self, function: Callable[[ServerBackend], Result]) -> Future[Result]:
        """``function`` of the model, awake, between two groups of requests."""
        return self._put(_Call(function, wakes=True)).done

    def wake(self) -> Future[None]:
        """Bring the model back to its device; nothing to do for one that is awake."""
        return self.call(lambda _: None)

    def sleep(self) -> Future[None]:
        """Free the model's device once everything submitted before is done; idempotent."""
        return self._put(_Call(lambda backend: self._fall_asleep(backend), wakes=False)).done

    def _put(self, item: Any) -> Any:
        with self._changed:
            self._waiting.append(item)
            self._changed.notify()
        return item

    def _free(self, job: ScoreJob) -> None:
        with self._changed:
            self._held -= job.held
            job.held = 0
            self._changed.notify()

    def _run(self, build: Callable[[], ServerBackend]) -> None:
        try:
            backend = build()
            if self.sleeps:
                self._fall_asleep(backend)
        except BaseException as error:  # the caller of ``backend`` raises it, SystemExit included
            self._built.set_exception(error)
            return
        self._built.set_result(backend)
        while True:
            item = self._take()
            try:
                if self._is_asleep and not (isinstance(item, _Call) and not item.wakes):
                    backend.wake()
                    self._is_asleep = False
                if isinstance(item, _Call):
                    item.done.set_result(item.function(backend))
                else:
                    _score_jobs(backend, item)
            except Exception as error:
                for each in [item] if isinstance(item, _Call) else item:
                    each.done.set_exception(error)

    def _fall_asleep(self, backend: ServerBackend) -> None:
        if not self._is_asleep:
            backend.sleep()
            self._is_asleep = True

    def _take(self) -> "_Call | list[ScoreJob]":
        """The next call, or the next requests that are computed together; waits for one."""
        with self._changed:
            while True:
                head = self._waiting[0] if self._waiting else None
                if isinstance(head, _Call):
                    self._waiting.popleft()
                    if head.done.set_running_or_notify_cancel():
                        return head
                elif head is not None and self._has_room(head):
                    if group := self._collect():
                        return group
                else:
                    self._changed.wait()

    def _collect(self) -> list[ScoreJob]:
        """The first jobs that are not cancelled, as far as tokens and bytes allow."""
        group: list[ScoreJob] = []
        room = self._max_waiting_tokens
        while self._waiting:
            job = self._waiting[0]
            if isinstance(job, _Call) or not self._has_room(job):
                break
            room -= len(job.request.token_ids)
            if group and room < 0:
                break
            self._waiting.popleft()
            if job.done.set_running_or_notify_cancel():
                job.held = job.size
                self._held += job.size
                group.append(job)
            else:
                room += len(job.request.token_ids)
        return group

    def _has_room(self, job: ScoreJob) -> bool:
        return not self._held or self._held + job.size <= self._max_held_bytes


@torch.inference_mode()
def _score_jobs(backend: Backend, group: Sequence[ScoreJob]) -> None:
    """Finish or fail every job; one that fails in the head does not affect the others."""
    try:
        tokens = sum(len(job.request.token_ids) for job in group)
        with span("hidden states", requests=len(group), tokens=tokens):
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
