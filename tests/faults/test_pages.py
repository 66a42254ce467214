"""Texts from outside are text in every page and table: names, prompts, completions, settings, tensors."""

import csv
import re
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import save_file

from opd.plain_text import write_csv
from opd.run.analyze import analyze
from opd.tracking.jsonl import JsonlTracker
from opd.tracking.report import compare_runs, write_report

PAYLOADS = (
    "<script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "\"'><svg onload=alert(1)>",
    "</style></title></svg><script>x()</script>",
    "javascript:alert(1)",
    "{{ 7*7 }}{% for x in y %}",
    "]]>--><!--<x>",
    "$\\frac{$",
    "\x00\x01\x1b[31m\u202e",
)
FORMULAS = ("=1+1", "+1", "-1", "@SUM(A1)", "\t=1", "\r=1", '=HYPERLINK("http://x")')


class Collector(HTMLParser):
    """Tags and attributes of a page."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))


def require_harmless(page: Path) -> None:
    """No element or attribute that a payload brings; a page of ours has no script that it could enter."""
    collector = Collector()
    text = page.read_text(encoding="utf-8")
    collector.feed(text)
    assert len(collector.tags) > 20
    for tag, attributes in collector.tags:
        assert tag not in ("x", "script"), tag
        assert not any(name.startswith("on") for name in attributes), attributes
        assert attributes.get("src") != "x"
        for name in ("href", "src"):
            assert "javascript:" not in (attributes.get(name) or "")
    assert "alert" in text, "the payload is shown"
    assert ">49<" not in text


@pytest.fixture(params=range(len(PAYLOADS)))
def payload(request: pytest.FixtureRequest) -> str:
    bad = PAYLOADS[request.param]
    return bad if "alert" in bad else f"{bad} alert"


def write_run(folder: Path, text: str) -> Path:
    folder.mkdir()
    about = {
        "config": {"train": {"steps": 2}, "optim": {"lr": text, text: 1}, "run": {"name": text}},
        "choices": {"optim": text, text: "x"},
        "command": text,
        "git": text,
        "versions": {text: text},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(about))
    tracker = JsonlTracker(folder)
    task = text.replace("/", "")
    for step in (0, 2):
        tracker.log(
            step, {f"eval/{task}/accuracy": 0.1 + step, f"{text}/x": 1.0, "loss/total": 1.0}
        )
        sample = {
            "task": task, "uid": text, "prompt": text, "answer": text, "completion": text,
            "correct": False, "tokens": [text, text], "gap": [0.5, -0.5],
        }  # fmt: skip
        tracker.log_samples(step, [sample, sample | {"uid": "other", "tokens": [], "gap": []}])
    return folder


@pytest.mark.filterwarnings("ignore")
def test_the_pages_of_runs_show_texts_as_texts(tmp_path: Path, payload: str) -> None:
    name = re.sub(r"[/\x00]", "", payload)
    one, two = write_run(tmp_path / name, payload), write_run(tmp_path / "two", "plain")
    require_harmless(write_report(one))
    page, _ = compare_runs([one, two], tmp_path)
    require_harmless(page)


def write_model(folder: Path, text: str, seed: int) -> Path:
    folder.mkdir()
    torch.manual_seed(seed)
    names = (f"model.layers.0.{text}.weight", f"model.layers.1.mlp.{text}.weight", f"{text}.weight")
    save_file(
        {name: torch.randn(32, 32).bfloat16() for name in names}, folder / "model.safetensors"
    )
    (folder / "config.json").write_text('{"model_type": "made"}')
    return folder


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("payload", [3, 7], indirect=True)
def test_the_page_of_an_analysis_shows_names_as_texts(tmp_path: Path, payload: str) -> None:
    name = re.sub(r"[/\x00]", "", payload)
    base = write_model(tmp_path / name, payload, 0)
    trained = write_model(tmp_path / f"{name} trained", payload, 1)
    found = analyze(str(base), str(trained), out=tmp_path / "out")
    assert found.report is not None
    require_harmless(found.report)


def cells(path: Path) -> Iterator[str]:
    with path.open(newline="", encoding="utf-8") as file:
        for row in csv.reader(file):
            yield from row


@pytest.mark.parametrize("formula", FORMULAS)
def test_a_spreadsheet_computes_no_cell(tmp_path: Path, formula: str) -> None:
    one = write_run(tmp_path / formula.replace("/", ""), formula)
    two = write_run(tmp_path / "two", "plain")
    _, table = compare_runs([one, two], tmp_path)
    found = list(cells(table))
    assert f"'{formula.replace('/', '')}" in found
    assert not any(cell.startswith(("=", "+", "@", "\t", "\r")) for cell in found)


def test_numbers_stay_numbers(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    rows = [{"a": -1.5, "b": "-1.5", "=c": None}, {"a": 2, "b": "x=1"}]
    write_csv(path, ["a", "b", "=c"], rows)
    assert list(cells(path)) == ["a", "b", "'=c", "-1.5", "'-1.5", "", "2", "x=1", ""]
