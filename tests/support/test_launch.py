"""What a case left counts, however its ranks ended; a case that left nothing is missing alone."""

from pathlib import Path

import pytest

from tests.support.launch import MOST_IDLE_STARTS, run_cases
from tests.support.results import REPORTS, Results

WORKS = """
import os, sys, time
from pathlib import Path
from tests.support.results import REPORTS, case_folder, finish_case, partial_folder

rank, out = int(os.environ["RANK"]), Path(sys.argv[1])

def work(case):
    print("rank", rank, "works on", case, flush=True)
    if rank == 0:
        partial_folder(out, case).mkdir()
        (partial_folder(out, case) / REPORTS).write_text('[{"loss": 1}]')
        if case != "bad":
            finish_case(out, case)
    while case != "bad" and not case_folder(out, case).is_dir():
        time.sleep(0.01)
"""
ABORTS_AT_EXIT = f"""{WORKS}
for case in sys.argv[2:]:
    if rank == 0:
        time.sleep(0.5)
        work(case)
os.abort()
"""
DIES = f"""{WORKS}
for case in sys.argv[2:]:
    work(case)
    if case == "bad":
        print("no more memory", flush=True)
        os._exit(9 if rank == 0 else 0)
"""
HANGS = f"""{WORKS}
for case in sys.argv[2:]:
    work(case)
    if case == "bad":
        time.sleep(10**6)
"""
LOSES_A_PEER = f"""{WORKS}
for case in sys.argv[2:]:
    if case == "bad" and rank == 1:
        sys.exit("killed by the kernel")
    work(case)
    if case == "bad":
        time.sleep(10**6)
"""
NEVER_STARTS = """
import sys
from pathlib import Path
with (Path(sys.argv[1]) / "starts").open("a") as starts:
    starts.write("*")
import no_such_module
"""


def test_a_rank_that_aborts_after_its_work_spoils_nothing(tmp_path: Path) -> None:
    results = Results(out=tmp_path)
    run_cases(results, 2, ["-c", ABORTS_AT_EXIT], ["one", "two/parts"])
    assert results.missing == {}
    assert results.reports("one") == results.reports("two/parts") == [{"loss": 1}]


@pytest.mark.parametrize(
    ("script", "patience", "ending", "output"),
    [
        (DIES, {}, "rank 0 ended with status 9", "rank 0 works on bad\nno more memory"),
        (HANGS, {"quiet_s": 10}, "for 10 s there was neither a result", "rank 1 works on bad"),
        (LOSES_A_PEER, {"alone_s": 2}, "rank 1 ended with status 1", "killed by the kernel"),
    ],
    ids=["dies", "hangs", "loses a peer"],
)
def test_a_case_that_its_ranks_do_not_survive_is_missing_alone(
    tmp_path: Path, script: str, patience: dict[str, float], ending: str, output: str
) -> None:
    results = Results(out=tmp_path)
    run_cases(results, 2, ["-c", script], ["one", "bad", "two"], **patience)
    assert list(results.missing) == ["bad"]
    assert results.reports("one") == results.reports("two") == [{"loss": 1}]
    with pytest.raises(pytest.fail.Exception, match="the case bad has no results") as failure:
        results.weights("bad")
    assert ending in str(failure.value)
    assert output in str(failure.value)


def test_a_script_that_cannot_start_is_not_started_for_every_case(tmp_path: Path) -> None:
    results, cases = Results(out=tmp_path), [f"case_{number}" for number in range(9)]
    run_cases(results, 1, ["-c", NEVER_STARTS], cases)
    assert (tmp_path / "starts").read_text() == "*" * MOST_IDLE_STARTS
    assert list(results.missing) == cases
    for case in cases:
        with pytest.raises(pytest.fail.Exception, match="No module named 'no_such_module'"):
            results.json(case, REPORTS)


def test_a_case_that_nobody_ran_is_named(tmp_path: Path) -> None:
    with pytest.raises(pytest.fail.Exception, match="no case other was run"):
        Results(out=tmp_path).folder("other")
