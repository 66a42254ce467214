"""Several teachers as one: routed by prompt, and load balanced over servers of the same weights."""

import random
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace

from opd.interfaces import Progress, Teacher
from opd.teacher.batches import progress_bar, score_concurrently
from opd.teacher.client import ServerTeacher
from opd.types import FloatArray, Rollout, ScoredRollout, TeacherInfo

COOLDOWN_S = 30.0  # before a server that failed gets requests again


class RoutedTeacher:
    """Scores each rollout with the teacher that its prompt names; all of them work concurrently.

    Names of the same teacher are scored together. ``ValueError`` for an unknown name.
    """

    def __init__(
        self, teachers: Mapping[str, Teacher], *, progress: Progress | None = None
    ) -> None:
        assert teachers, "a pool has at least one member"
        self._teachers = teachers
        self._progress = progress

    def score(self, rollouts: Sequence[Rollout]) -> list[ScoredRollout]:
        """See ``Teacher``."""
        shares: dict[int, list[int]] = {}
        for index, rollout in enumerate(rollouts):
            teacher = self._require(rollout.prompt.teacher, f"prompt {rollout.prompt.uid}")
            shares.setdefault(id(teacher), []).append(index)
        scored: dict[int, ScoredRollout] = {}

        def score_share(indices: list[int]) -> int:
            teacher = self._require(rollouts[indices[0]].prompt.teacher, "a prompt")
            share = teacher.score([rollouts[i] for i in indices])
            scored.update(zip(indices, share, strict=True))
            return len(indices)

        with (
            progress_bar(self._progress, rollouts) as advance,
            ThreadPoolExecutor(max(1, len(shares))) as pool,
        ):
            for count in pool.map(score_share, shares.values()):
                advance(count)
        return [scored[index] for index in range(len(rollouts))]

    def info(self) -> TeacherInfo:
        """The first teacher's, with the smallest vocabulary and length of all."""
        infos = [teacher.info() for teacher in self._teachers.values()]
        return replace(
            infos[0],
            vocab_size=min(info.vocab_size for info in infos),
            max_length=min(info.max_length for info in infos),
        )

    def head(self, name: str | None = None) -> FloatArray:
        """The head of the teacher called ``name``."""
        return self._require(name, "a head").head()

    def _require(self, name: str | None, subject: str) -> Teacher:
        if name is None or name not in self._teachers:
            found = "names no teacher" if name is None else f"names teacher {name!r}"
            raise ValueError(
                f"{subject} {found}, there are {', '.join(sorted(self._teachers))}: give every prompt "
                "one of them, or add it to teacher.members"
            )
        return self._teachers[name]


@dataclass(slots=True)
class _Server:
    """One server: its open tokens, and when its cooldown after a failure ends (0: it has not failed)."""

    connect: Callable[[], ServerTeacher]
    client: ServerTeacher | None = None
    open_tokens: int = 0
    cooldown_until: float = 0.0
    lock: threading.Lock = field(default_factory=threading.Lock)

    def connected(self) -> ServerTeacher:
        """Its client, made at the first call; it then reads the server's info."""
        with self.lock:
            if self.client is None:
                self.client = self.connect()
            return self.client


class BalancedTeacher:
    """Several servers of the same weights; each request goes to the one with the fewest open tokens.

    A server that fails after its client's retries gets a cooldown of half a minute, and its request
    goes to the others. After the cooldown it gets one request at a time, without retries, until one
    succeeds. ``ConnectionError`` when every server has failed the same request. ``ValueError`` when
    the servers do not have the same teacher.
    """

    def __init__(
        self,
        connects: Sequence[Callable[[], ServerTeacher]],
        *,
        progress: Progress | None = None,
    ) -> None:
        assert connects, "a teacher has at least one server"
        self._servers = [_Server(connect) for connect in connects]
        self._progress = progress
        self._lock = threading.Lock()
        with ThreadPoolExecutor(len(self._servers)) as pool:
            failures = [
                f for f in pool.map(self._connection_failure, self._servers) if f is not None
            ]
        if len(failures) == len(self._servers):
            raise failures[-1]
        clients = [server.client for server in self._servers if server.client is not None]
        self._first = clients[0]
        for client in clients:
            self._require_same(client)

    def score(self, rollouts: Sequence[Rollout]) -> list[ScoredRollout]:
        """See ``Teacher``."""
        groups = self._first.groups(rollouts, servers=len(self._servers))
        width = self._first.connections * len(self._servers)
        with progress_bar(self._progress, rollouts) as advance:
            return score_concurrently(
                self._score_group, groups, max_concurrent=width, advance=advance
            )

    def info(self) -> TeacherInfo:
        """See ``Teacher``."""
        return self._first.info()

    def head(self, name: str | None = None) -> FloatArray:
        """See ``ServerTeacher``; from the first server that responds."""
        failure: ConnectionError | None = None
        for server in [s for s in self._servers if s.client is not None]:
            try:
                return server.connected().head()
            except ConnectionError as error:
                failure = error
        assert failure is not None
        raise failure

    def _connection_failure(self, server: _Server) -> ConnectionError | None:
        try:
            server.connected()
        except ConnectionError as error:
            server.cooldown_until = time.monotonic() + COOLDOWN_S
            return error
        return None

    def _score_group(self, group: Sequence[Rollout]) -> list[ScoredRollout]:
        tokens = sum(len(rollout.teacher_sequence) for rollout in group)
        untried = list(self._servers)
        while True:
            server, has_failed = self._reserve_least_loaded(untried, tokens)
            untried.remove(server)
            try:
                client = self._require_same(server.connected())
                scored = client.score_group(group, retries=0 if has_failed else None)
            except ConnectionError:
                server.cooldown_until = time.monotonic() + COOLDOWN_S
                if not untried:
                    raise
            else:
                server.cooldown_until = 0.0
                return scored
            finally:
                with self._lock:
                    server.open_tokens -= tokens

    def _reserve_least_loaded(
        self, servers: Sequence[_Server], tokens: int
    ) -> tuple[_Server, bool]:
        """The server, with ``tokens`` more open tokens, and whether its last request failed.

        One whose cooldown is over gets one request at a time; one in its cooldown is the last resort.
        """
        with self._lock:
            now = time.monotonic()

            def order(server: _Server) -> tuple[bool, int, float]:
                is_probed = server.cooldown_until > 0 and server.open_tokens > 0
                is_last_resort = server.cooldown_until > now or is_probed
                return is_last_resort, server.open_tokens, random.random()

            server = min(servers, key=order)
            server.open_tokens += tokens
            return server, server.cooldown_until > 0

    def _require_same(self, client: ServerTeacher) -> ServerTeacher:
        """``client``, if its server has the same teacher as the first."""
        first, other = self._first.info(), client.info()
        if replace(other, model=first.model) != first:
            raise ValueError(
                f"the servers {self._first.url} and {client.url} have different teachers "
                f"({first.model} and {other.model}): give each a name of its own in teacher.members"
            )
        return client
