"""Which rank is late: one that is stopped, one that others wait for, never one that waits."""

import json
from dataclasses import asdict
from pathlib import Path

import pytest

from opd.config.launch import DeadlineConfig
from opd.heartbeat import Beat, Heartbeat, beat_path, read_beat
from opd.phases import RunPhase
from opd.run.hang import SILENT_S, HangWatch, RankHung

DEADLINES = DeadlineConfig(rollout=60, learn=30, start=200)


class Ranks:
    """Two ranks, the time, and a watch; every second all ranks beat that are not stopped."""

    def __init__(self, folder: Path, deadlines: DeadlineConfig = DEADLINES) -> None:
        self.folder, self.now = folder, 1000.0
        self.beats = [Beat(rank=rank, host="node", pid=7 + rank) for rank in range(2)]
        self.stopped: set[int] = set()
        beat_path(folder, 0).parent.mkdir(parents=True)
        self.watch = HangWatch(folder, 2, deadlines, clock=lambda: self.now)

    def change(self, rank: int, **changes: object) -> None:
        beat = asdict(self.beats[rank]) | changes
        self.beats[rank] = Beat(**beat)

    def enter(self, rank: int, phase: RunPhase, step: int, *, waits: bool = False) -> None:
        moves = self.beats[rank].moves + 1
        self.change(rank, phase=phase, step=step, waits=waits, moves=moves)

    def live(self, seconds: int) -> None:
        for _ in range(seconds):
            self.now += 1
            for rank in {0, 1} - self.stopped:
                self.change(rank, beats=self.beats[rank].beats + 1)
                beat_path(self.folder, rank).write_text(json.dumps(asdict(self.beats[rank])))
            self.watch.check()

    def hang(self, seconds: int) -> str:
        with pytest.raises(RankHung) as error:
            self.live(seconds)
        return str(error.value)


@pytest.fixture
def ranks(tmp_path: Path) -> Ranks:
    return Ranks(tmp_path)


def test_a_stopped_rank_is_named_and_not_the_one_that_waits_for_it(ranks: Ranks) -> None:
    for rank in (0, 1):
        ranks.enter(rank, RunPhase.rollout, 3)
    ranks.live(5)
    ranks.stopped = {1}
    ranks.enter(0, RunPhase.learn, 3, waits=True)
    before = ranks.now
    sentence = ranks.hang(100)
    assert sentence.startswith("rank 1 on node is stopped or hangs: in phase rollout of step 3")
    assert "launch.deadlines.rollout=60" in sentence
    assert ranks.now - before <= 60 + 2


def test_a_rank_that_waits_is_not_late_while_another_works_within_its_deadline(
    ranks: Ranks,
) -> None:
    ranks.enter(0, RunPhase.learn, 3, waits=True)
    ranks.enter(1, RunPhase.rollout, 3)
    ranks.live(59)
    ranks.enter(1, RunPhase.rollout, 3)  # one of its requests was finished
    ranks.live(59)


def test_a_main_thread_that_hangs_is_told_from_one_that_waits_for_it(ranks: Ranks) -> None:
    ranks.enter(0, RunPhase.learn, 3, waits=True)
    ranks.live(3)
    ranks.enter(1, RunPhase.learn, 3)
    sentence = ranks.hang(100)
    assert sentence.startswith("rank 1 on node hangs: in phase learn of step 3")


def test_a_rank_that_was_stopped_inside_a_collective_is_named(ranks: Ranks) -> None:
    for rank in (0, 1):
        ranks.enter(rank, RunPhase.learn, 3, waits=True)
    ranks.live(2)
    ranks.stopped = {0}
    assert ranks.hang(100).startswith("rank 0 on node is stopped or hangs: in phase learn")


def test_where_all_wait_all_are_named(ranks: Ranks) -> None:
    for rank in (0, 1):
        ranks.enter(rank, RunPhase.learn, 3, waits=True)
    sentence = ranks.hang(100)
    assert "rank 0 on node hangs" in sentence
    assert " and rank 1 on node hangs" in sentence


def test_a_rank_that_never_starts_is_named_without_a_host(ranks: Ranks) -> None:
    ranks.stopped = {1}
    ranks.enter(0, RunPhase.learn, 1, waits=True)
    assert ranks.hang(300).startswith("rank 1 hangs: in phase start it finished nothing for 20")


def test_records_of_an_earlier_run_are_no_news(tmp_path: Path) -> None:
    beat_path(tmp_path, 0).parent.mkdir(parents=True)
    for rank in (0, 1):
        old = Beat(rank=rank, host="old", pid=3, phase=RunPhase.done, step=9)
        beat_path(tmp_path, rank).write_text(json.dumps(asdict(old)))
    watch = HangWatch(tmp_path, 2, DEADLINES, clock=lambda: 0.0)
    assert watch.phase(0) == (RunPhase.start, 0)


def test_time_in_which_the_watcher_was_stopped_does_not_count(ranks: Ranks) -> None:
    for rank in (0, 1):
        ranks.enter(rank, RunPhase.learn, 3)
    ranks.live(25)
    ranks.now += 3600
    ranks.live(4)
    assert "finished nothing for 3" in ranks.hang(10)


def test_the_time_in_which_a_server_is_started_again_is_forgiven(ranks: Ranks) -> None:
    for rank in (0, 1):
        ranks.enter(rank, RunPhase.learn, 3)
    for _ in range(100):
        ranks.now += 1
        ranks.watch.forgive()
    ranks.live(29)


def test_no_deadline_is_no_deadline(tmp_path: Path) -> None:
    ranks = Ranks(tmp_path, DeadlineConfig(learn=0))
    for rank in (0, 1):
        ranks.enter(rank, RunPhase.learn, 3)
    ranks.live(50)


def test_a_heartbeat_beats_by_itself_and_moves_with_its_phases(tmp_path: Path) -> None:
    heartbeat = Heartbeat(tmp_path, 1)
    assert read_beat(tmp_path, 0) is None
    heartbeat.enter(RunPhase.learn, 12)
    first = read_beat(tmp_path, 1)
    assert first is not None
    assert (first.phase, first.step, first.moves) == (RunPhase.learn, 12, 1)
    heartbeat.move()
    while (later := read_beat(tmp_path, 1)) is None or later.beats < 2:
        pass
    assert (later.moves, later.waits, later.phase) == (2, False, RunPhase.learn)
    assert SILENT_S > 2


def test_a_record_that_is_being_written_is_none(tmp_path: Path) -> None:
    beat_path(tmp_path, 0).parent.mkdir(parents=True)
    beat_path(tmp_path, 0).write_text('{"rank": 0, "host"')
    assert read_beat(tmp_path, 0) is None
