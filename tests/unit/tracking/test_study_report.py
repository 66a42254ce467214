"""Arms over seeds: intervals, paired differences, and conclusions that do not claim too much."""

import json
import math
from pathlib import Path

import numpy as np
import pytest

from opd.tracking.runs import RunRecord
from opd.tracking.study_report import Arms, interval, study_measures, write_arms


def run(accuracies: list[float], kls: list[float], density: float | None) -> RunRecord:
    rows = [
        {"step": 10 * i, "eval/sums/accuracy": a, "eval/sums/reverse_kl": k}
        for i, (a, k) in enumerate(zip(accuracies, kls, strict=True))
    ]
    if density is not None:
        rows[-1]["mask/density"] = density
    return RunRecord(
        name="x",
        folder=Path("x"),
        config={},
        choices={},
        about={},
        rows=rows,
        samples=[],
        has_final=True,
        recorded=[],
    )


def arms() -> Arms:
    full = {s: run([0.2, 0.6, 0.90 + 0.01 * s], [1.0, 0.5, 0.10], None) for s in range(3)}
    mask = {s: run([0.2, 0.5, 0.90 + 0.01 * s], [1.0, 0.5, 0.11], 0.2) for s in range(3)}
    chance = {s: run([0.2, 0.3, 0.50 + 0.01 * s], [1.0, 0.8, 0.60 + s], 0.2) for s in range(3)}
    return Arms(
        runs={"full": full, "discovered": mask, "random": chance},
        measures=study_measures("sums"),
        pairs=[("discovered", "full"), ("discovered", "random")],
    )


def test_the_interval_holds_the_mean_in_95_of_100_experiments() -> None:
    draw = np.random.default_rng(0)
    held = [
        abs(found.mean - 5.0) <= found.half
        for found in (interval(draw.normal(5.0, 2.0, size=3).tolist()) for _ in range(4000))
    ]
    assert np.mean(held) == pytest.approx(0.95, abs=0.01)


def test_one_value_has_no_interval() -> None:
    assert interval([0.3]).half == math.inf
    assert not interval([0.3]).excludes_zero


def test_differences_are_paired_and_stated_plainly() -> None:
    sentences = {
        (d.measure.name, d.other): d.sentence for d in arms().differences() if d.arm == "discovered"
    }
    # the seeds move both arms alike, so pairing leaves a difference of exactly 0.4
    assert "+0.400 ± 0.000: real, discovered is better" in sentences["accuracy", "random"]
    assert "no difference that these seeds can show" in sentences["accuracy", "full"]
    assert "real, discovered is worse" in sentences["reverse KL", "full"]
    assert "no difference that these seeds can show" in sentences["reverse KL", "random"]
    assert "real, discovered is worse" in sentences["accuracy on the way", "full"]


def test_the_study_is_written_as_json_markdown_and_a_figure(tmp_path: Path) -> None:
    paths = write_arms(arms(), tmp_path, "three ways")
    assert [p.name for p in paths] == ["study.json", "study.md", "study.png"]
    written = json.loads(paths[0].read_text())
    assert written["values"]["random"]["accuracy"] == {"0": 0.5, "1": 0.51, "2": 0.52}
    page = paths[1].read_text()
    assert "| full | 100 % | 0.910 ± 0.025 |" in page
    assert "| discovered | 20.00% |" in page
    assert paths[2].read_bytes().startswith(b"\x89PNG")
