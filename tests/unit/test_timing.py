"""Spans of several threads and processes in one trace; nothing without a folder."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from opd.timing import TRACE_FOLDER, timed, write_trace

WRITER = """
from opd.timing import name_process, span, timed
name_process("rank 0")
with timed({}, "time/learn"):
    with span("forward", tokens=7):
        pass
with span("rollout"):
    pass
"""


def test_every_process_has_a_lane_with_its_spans_nested(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(TRACE_FOLDER, str(tmp_path / "parts"))
    for _ in range(2):
        subprocess.run([sys.executable, "-c", WRITER], check=True)
    with (tmp_path / "parts" / "killed.jsonl").open("w") as file:
        file.write('{"name": "cut')
    write_trace(tmp_path / "parts", tmp_path / "trace.json")
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    assert len({event["pid"] for event in events}) == 2
    names = [event["name"] for event in events if event["ph"] == "X"]
    assert sorted(names) == sorted(["forward", "learn", "rollout"] * 2)
    spans = {event["name"]: event for event in events if event["ph"] == "X"}
    forward, learn = spans["forward"], spans["learn"]
    assert learn["ts"] <= forward["ts"]
    assert forward["ts"] + forward["dur"] <= learn["ts"] + learn["dur"]
    assert forward["args"] == {"tokens": 7}
    assert min(event["ts"] for event in spans.values()) >= 0.0


def test_without_a_folder_only_seconds_are_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(TRACE_FOLDER, raising=False)
    times: dict[str, float] = {}
    with timed(times, "time/learn"):
        pass
    assert times["time/learn"] >= 0.0
