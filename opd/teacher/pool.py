"""Several teachers behind one seam: each prompt's own, and several servers of the same weights."""

import random
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace

from opd.interfaces import Progress, Teacher
from opd.teacher.batches import at_once, bar
from opd.teacher.client import ServerTeacher
from opd.types import FloatArray, Rollout, ScoredRollout, TeacherInfo

REST_S = 30.0  # before a server that stayed away is asked again


class RoutedTeacher:
    """Each rollout is scored by the teacher that its prompt names; all of them work at once.

    Names with the same teacher are scored together. ``ValueError`` for a name that is not there.
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
        for place, rollout in enumerate(rollouts):
            teacher = self._named(rollout.prompt.teacher, f"prompt {rollout.prompt.uid}")
            shares.setdefault(id(teacher), []).append(place)
        found: dict[int, ScoredRollout] = {}

        def score(places: list[int]) -> int:
            teacher = self._named(rollouts[places[0]].prompt.teacher, "a prompt")
            found.update(zip(places, teacher.score([rollouts[p] for p in places]), strict=True))
            return len(places)

        with (
            bar(self._progress, rollouts) as advance,
            ThreadPoolExecutor(max(1, len(shares))) as pool,
        ):
            for scored in pool.map(score, shares.values()):
                advance(scored)
        return [found[place] for place in range(len(rollouts))]

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
        return self._named(name, "a head").head()

    def _named(self, name: str | None, what: str) -> Teacher:
        if name is None or name not in self._teachers:
            asked = "names no teacher" if name is None else f"asks for teacher {name!r}"
            raise ValueError(
                f"{what} {asked}, there are {', '.join(sorted(self._teachers))}: give every prompt "
                "one of them, or add it to teacher.members"
            )
        return self._teachers[name]


@dataclass(slots=True)
class _Seat:
    """One server, how many tokens it is asked about now, and until when it is left alone."""

    connect: Callable[[], ServerTeacher]
    client: ServerTeacher | None = None
    load: int = 0
    rests_until: float = 0.0
    lock: threading.Lock = field(default_factory=threading.Lock)

    def connected(self) -> ServerTeacher:
        """Its client, which asks the server what it is when it is made."""
        with self.lock:
            if self.client is None:
                self.client = self.connect()
            return self.client


class BalancedTeacher:
    """Several servers of the same weights; each request goes to the one with the least to do.

    A server that stays away after its client's retries rests for half a minute, and what it was asked
    goes to the others; a resting one is asked once, and is in again when it answers. Only a request
    that every server has failed raises ``ConnectionError``. ``ValueError`` when the servers do not
    have the same teacher.
    """

    def __init__(
        self,
        connects: Sequence[Callable[[], ServerTeacher]],
        *,
        progress: Progress | None = None,
    ) -> None:
        assert connects, "a teacher has at least one server"
        self._seats = [_Seat(connect) for connect in connects]
        self._progress = progress
        self._lock = threading.Lock()
        with ThreadPoolExecutor(len(self._seats)) as pool:
            failures = [f for f in pool.map(self._failure, self._seats) if f is not None]
        if len(failures) == len(self._seats):
            raise failures[-1]
        clients = [seat.client for seat in self._seats if seat.client is not None]
        self._first = clients[0]
        for client in clients:
            self._same(client)

    def score(self, rollouts: Sequence[Rollout]) -> list[ScoredRollout]:
        """See ``Teacher``."""
        groups = self._first.groups(rollouts, servers=len(self._seats))
        width = self._first.connections * len(self._seats)
        with bar(self._progress, rollouts) as advance:
            return at_once(self._score_group, groups, most=width, advance=advance)

    def info(self) -> TeacherInfo:
        """See ``Teacher``."""
        return self._first.info()

    def head(self, name: str | None = None) -> FloatArray:
        """See ``ServerTeacher``; from the first server that gives it."""
        failure: ConnectionError | None = None
        for seat in [s for s in self._seats if s.client is not None]:
            try:
                return seat.connected().head()
            except ConnectionError as error:
                failure = error
        assert failure is not None
        raise failure

    def _failure(self, seat: _Seat) -> ConnectionError | None:
        try:
            seat.connected()
        except ConnectionError as error:
            seat.rests_until = time.monotonic() + REST_S
            return error
        return None

    def _score_group(self, group: Sequence[Rollout]) -> list[ScoredRollout]:
        tokens = sum(len(rollout.teacher_sequence) for rollout in group)
        untried = list(self._seats)
        while True:
            seat, is_resting = self._least_loaded(untried, tokens)
            untried.remove(seat)
            try:
                client = self._same(seat.connected())
                scored = client.score_group(group, retries=0 if is_resting else None)
            except ConnectionError:
                seat.rests_until = time.monotonic() + REST_S
                if not untried:
                    raise
            else:
                seat.rests_until = 0.0
                return scored
            finally:
                with self._lock:
                    seat.load -= tokens

    def _least_loaded(self, seats: Sequence[_Seat], tokens: int) -> tuple[_Seat, bool]:
        """The seat, now loaded with ``tokens``, and whether it was left out.

        One whose rest is over gets one request at a time; a resting one is the last resort.
        """
        with self._lock:
            now = time.monotonic()

            def order(seat: _Seat) -> tuple[int, int, float]:
                probing = seat.rests_until and seat.load
                waits = 2 if seat.rests_until > now or probing else 0
                return waits, seat.load, random.random()

            seat = min(seats, key=order)
            seat.load += tokens
            return seat, seat.rests_until > 0

    def _same(self, client: ServerTeacher) -> ServerTeacher:
        """``client``, if its server says it has the first one's teacher."""
        ours, theirs = self._first.info(), client.info()
        if replace(theirs, model=ours.model) != ours:
            raise ValueError(
                f"the servers {self._first.url} and {client.url} have different teachers "
                f"({ours.model} and {theirs.model}): give each a name of its own in teacher.members"
            )
        return client
