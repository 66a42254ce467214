"""``opd mask`` does its work, and says in a sentence why it cannot."""

import json
from dataclasses import fields
from pathlib import Path

import pytest

from opd.cli.main import run
from opd.cli.mask_files import DiscoverArguments
from opd.config.fields import sentence
from opd.mask.mask import Mask
from tests.unit.mask.models import NUMEL, moved, stored, weights


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stored(tmp_path / "base", weights())
    stored(tmp_path / "trained", moved(weights()))
    stored(tmp_path / "other", weights(seed=9))
    monkeypatch.chdir(tmp_path)


def discover(*words: str) -> int:
    return run(["mask", "discover", "base=base", *words])


def test_discover_writes_a_mask_that_knows_its_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert discover("rule=near_zero", "density=0.1", "out=m", "exclude=['*norm*']") == 0
    mask = Mask.read("m")
    assert sum(mask.counts().values()) == round(0.1 * NUMEL)
    assert mask.origin.command == (
        "opd mask discover base=base rule=near_zero density=0.1 out=m 'exclude=['\"'\"'*norm*'\"'\"']'"
    )
    assert f"{round(0.1 * NUMEL):,}" in capsys.readouterr().out


def test_more_than_changed_is_a_warning(capsys: pytest.CaptureFixture[str]) -> None:
    assert discover("trained=trained", "density=1", "out=m") == 0
    assert "opd: warning: density=1.0 asks for more" in capsys.readouterr().err


def test_show_compare_and_combine_answer_in_tables_and_json(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert discover("rule=near_zero", "density=0.1", "out=a") == 0
    assert discover("rule=random", "density=0.2", "out=b") == 0
    assert run(["mask", "show", "a", "out=figures"]) == 0
    assert "q_proj" in capsys.readouterr().out
    assert run(["mask", "show", "a", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["kept"] == round(0.1 * NUMEL)
    assert run(["mask", "compare", "a", "b", "base=base", "out=figures"]) == 0
    assert "chance: and per binade" in capsys.readouterr().out
    assert run(["mask", "compare", "a", "b", "--json"]) == 0
    assert set(json.loads(capsys.readouterr().out)["whole"]["chance"]) == {"global", "tensor"}
    assert {p.name for p in Path("figures").iterdir()} == {"density.png", "overlap.png"}
    assert run(["mask", "combine", "difference", "a", "b", "out=c"]) == 0
    combined = Mask.read("c")
    assert combined.origin.command == "opd mask combine difference a b out=c"
    assert not set(combined.indices["model.norm.weight"].tolist()) & set(
        Mask.read("b").indices["model.norm.weight"].tolist()
    )


VERBS = ("discover", "show", "compare", "combine", "export", "apply", "undo")


@pytest.mark.parametrize("verb", [None, *VERBS])
def test_help_fits_a_screen_and_has_an_example(
    capsys: pytest.CaptureFixture[str], verb: str | None
) -> None:
    words = ["mask", "--help"] if verb is None else ["mask", verb, "--help"]
    if verb is None:
        assert run(words) == 0
    else:
        with pytest.raises(SystemExit) as ended:
            run(words)
        assert ended.value.code == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(f"usage: opd mask {verb or 'VERB'} ")
    assert sum(line.startswith("example: opd mask ") for line in lines) == 1
    assert len(lines) <= 40
    assert max(len(line) for line in lines) <= 100


def test_help_explains_every_key_to_the_end(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        run(["mask", "discover", "--help"])
    assert ended.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    for field in fields(DiscoverArguments):
        assert f" {field.name}=" in text
        assert sentence(DiscoverArguments, field.name).rstrip(".") in text
    for words in ("(global, tensor, module)", "Fixes random rules", "out=*required"):
        assert words in text


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["discover", "out=m"], ["base=... is missing"]),
        (
            ["discover", "out=m", "trained=base"],
            ["base=... is missing", "trained=base is not a run"],
        ),
        (["discover", "base=base"], ["out=... is missing"]),
        (["discover", "base=base", "out=m", "densty=1"], ["densty", "did you mean density?"]),
        (
            ["discover", "base=base", "out=m", "density"],
            ["unexpected argument density: usage: opd mask discover"],
        ),
        (["discover", "base=base", "out=m", "density=x"], ["density=x: expected a number"]),
        (["discover", "base=base", "out=m", "density=2"], ["density=2", "1 or less"]),
        (["discover", "base=base", "out=m", "rule=best"], ["rule=best", "near_zero"]),
        (["discover", "base=base", "out=m", "exclude=*norm*"], ["exclude=*norm*", "a list"]),
        (["discover", "base=base", "out=m", "seed=1.5"], ["seed=1.5", "whole number"]),
        (["discover", "base=base", "out=m", "--fast"], ["unknown option --fast"]),
        (
            ["discover", "base=base", "out=m", "density=0.1", "rule=fisher", "recipe=quickstart"],
            ["base=base is not the recipe's student.model"],
        ),
        (["discover", "base=base", "out=m", "density=0.1"], ["rule=delta needs trained"]),
        (["discover", "base=base", "out=base", "density=0.1"], ["out=base is a folder"]),
        (
            ["discover", "base=base", "out=taken", "density=0.1"],
            ["out=taken already exists", "overwrite"],
        ),
        (["discover", "base=nowhere/at/all", "out=m", "rule=random", "density=1"], ["nowhere"]),
        (["discover", "base=base", "out=m", "rule=fisher", "density=1"], ["recipe=RECIPE"]),
        (
            ["discover", "base=base", "out=m", "rule=random", "density=1", "recipe=quickstart"],
            ["recipe=quickstart has no effect"],
        ),
        (["discover", "base=base", "out=m", "rule=random", "like=nowhere"], ["no mask file"]),
        (["discover", "base=other", "out=m", "rule=random", "like=a"], ["made for base"]),
        (["show", "nowhere"], ["there is no mask file nowhere"]),
        (["show", "a", "more"], ["unexpected argument more"]),
        (["show", "base/model.safetensors"], ["is not an opd mask file"]),
        (["compare", "a", "a", "base=other"], ["made for base", "found other"]),
        (["compare", "a", "a", "bass=other"], ["did you mean base?"]),
        (["combine", "xor", "a", "a", "out=m"], ["xor", "union, intersection, difference"]),
        (["combine", "union", "a", "a"], ["out=... is missing"]),
    ],
    ids=lambda value: " ".join(value)[:60],
)
def test_a_mistake_is_one_sentence_with_status_2(
    capsys: pytest.CaptureFixture[str], words: list[str], expected: list[str]
) -> None:
    Path("taken").write_text("precious")
    assert discover("rule=random", "density=0.1", "out=a") == 0
    capsys.readouterr()
    assert run(["mask", *words]) == 2
    error = capsys.readouterr().err
    assert error.startswith("opd: ")
    assert error.count("\n") == 1
    for part in expected:
        assert part in error
    assert not Path("m").exists()
    assert Path("taken").read_text() == "precious"
