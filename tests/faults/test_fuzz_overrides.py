"""Overrides that nobody would type: every command line is run, or refused in words."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import strategies as st

from opd.cli.main import run
from opd.config.schema import GROUPS
from opd.run.recipe import bundled_recipes
from opd.run.recipe_errors import known_keys
from tests.support.fuzz import fuzz, require_sentence, shares

HOSTILE = (
    *("", "null", "None", "???", "true", "0", "-1", "1", "2", "0x10", "1_000"),
    *("nan", "inf", "-inf", "1e308", "1e-320", "1e400", "9" * 23),
    *("abc", "'a b'", '"x"', "'", '"', "\\", "%s", "{0}", "=", "a=b", "~", "@", "&a", "*a"),
    *("[]", "{}", "[1,2]", "{a:1}", "{a:{b:c}}", "[[]]", "[null]", "[", "}", "a,b", "1,2"),
    *("choice(1,2)", "range(1,3)", "${run.name}", "${oc.env:HOME}", "${oc.env:HF_TOKEN}"),
    *("${nope}", "${here:x}", "${choice:optim,1}", "${choice:nope,{else:1}}"),
    *(
        "\x07",
        "\x1b[31mred",
        "'\x1b[31m'",
        "a\nb",
        "'a\nb'",
        "'\x00'",
        "'\u202e'",
        "é",
        "\U0001d4b3",
    ),
    *("a" * 5000, "missing.jsonl", "x.json", "no/such", "x:y", "os:getcwd", "..", "'[/INST]'"),
    "!!python/object/apply:os.system ['x']",
)
SIGNS = ("", "", "", "", "+", "++", "~")
KEYS = sorted(set(known_keys()) - {"run.dir"})  # a folder of the test's own

values = st.sampled_from(HOSTILE)
choices = st.sampled_from(
    [f"{group}={name}" for group, named in GROUPS.items() for name in (*named, "nope", "")]
)
settings = st.builds(lambda key, value: f"{key}={value}", st.sampled_from(KEYS), values)
nonsense = st.one_of(
    st.text(max_size=12),
    st.builds(lambda key, value: f"{key}={value}", values, values),
    st.sampled_from(KEYS).map(lambda key: f"~{key}"),
)
override = st.builds(
    lambda sign, rest: sign + rest, st.sampled_from(SIGNS), settings | settings | choices
)
overrides = st.lists(override | override | nonsense, min_size=1, max_size=3)
recipes = st.sampled_from(["quickstart", *sorted(bundled_recipes())])


@pytest.fixture
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    yield
    assert set(os.listdir(tmp_path)) <= {"out"}, "a dry run wrote beside its folder"


@shares(30)
@pytest.mark.filterwarnings("ignore")
def test_a_command_line_is_run_or_refused_in_words(
    examples: int, offline: None, capsys: pytest.CaptureFixture[str]
) -> None:
    def check(recipe: str, words: list[str]) -> None:
        status = run(["train", recipe, *words, "run.dir=out", "dry_run=true"])
        printed = capsys.readouterr()
        assert status in (0, 2), printed.err
        if status == 0:
            assert "\x1b" not in printed.out
        else:
            assert printed.err.startswith("opd: ")
            require_sentence(printed.err)

    fuzz(check, recipes, overrides, examples=examples)
