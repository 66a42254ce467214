"""Texts from outside are printed as they are: a name in brackets is no markup."""

import ast
from pathlib import Path

import pytest

import opd
from opd.cli.main import run

PACKAGE = Path(opd.__file__).parent


@pytest.mark.parametrize("name", ["a[/x]b", "[/INST]", "[bold]x", "[link=x]y"])
def test_a_name_in_brackets_is_printed_as_it_is(
    name: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    assert run(["train", "quickstart", "dry_run=true", f"run.name='{name}'"]) == 0
    assert f"runs/{name}" in capsys.readouterr().out


def test_no_console_reads_markup() -> None:
    calls = [
        (path, node)
        for path in PACKAGE.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "Console"
    ]  # fmt: skip
    assert calls
    for path, call in calls:
        keywords = {k.arg: ast.literal_eval(k.value) for k in call.keywords if k.arg == "markup"}
        assert keywords == {"markup": False}, f"{path}:{call.lineno}"
