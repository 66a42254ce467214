"""Former names, unknown keys and values of a wrong type are explained, wherever they are written."""

from pathlib import Path

import pytest

from opd.cli.main import run
from opd.config.schema import FORMER_NAMES
from opd.run.recipe import composed, find_recipe, load_recipe
from opd.run.recipe_errors import known_keys

QUICKSTART = find_recipe("quickstart")


def written(folder: Path, key: str, value: str = "1") -> Path:
    """A recipe with one more setting in it."""
    group, _, name = key.partition(".")
    recipe = folder / "mine.yaml"
    recipe.write_text(
        f"defaults:\n  - base\n  - _self_\nrun: {{name: mine}}\n{group}:\n  {name}: {value}\n"
    )
    return recipe


def message(recipe: Path, *overrides: str) -> str:
    with pytest.raises(ValueError) as refused:
        composed(recipe, overrides)
    return str(refused.value)


@pytest.mark.parametrize("former", FORMER_NAMES)
def test_a_former_name_is_refused_with_the_present_one(former: str, tmp_path: Path) -> None:
    expected = f"{former} is now called {FORMER_NAMES[former]}: use that name"
    assert message(QUICKSTART, f"{former}=1") == expected
    assert message(QUICKSTART, f"+{former}=1") == expected
    assert message(written(tmp_path, former)) == expected


def test_a_former_name_exists_no_more_and_the_present_one_does() -> None:
    known = set(known_keys())
    assert not known & set(FORMER_NAMES)
    assert set(FORMER_NAMES.values()) <= known


def test_a_former_name_in_a_sweep_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["train", "quickstart", "-m", "optim.clip=1,2"]) == 2
    assert "optim.clip is now called optim.max_grad_norm" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("optim.lr", "fast", "optim.lr=fast: expected a number > 0, ≤ 1e+06"),
        ("train.steps", "2.5", "train.steps=2.5: expected a whole number ≥ 0"),
        ("train.precision", "fp8", "train.precision=fp8: expected one of fp32, bf16, pure_bf16"),
    ],
)
def test_a_value_of_a_wrong_type_is_named_with_its_setting(
    key: str, value: str, expected: str, tmp_path: Path
) -> None:
    assert message(QUICKSTART, f"{key}={value}") == expected
    assert message(written(tmp_path, key, value)) == expected


def test_an_unknown_choice_lists_those_there_are() -> None:
    assert message(QUICKSTART, "optim=adam") == "there is no optim=adam: allowed are adamw, sgd"


def test_an_unknown_setting_comes_with_the_nearest_ones(tmp_path: Path) -> None:
    expected = "there is no setting train.step: did you mean train.steps"
    assert message(QUICKSTART, "train.step=1").startswith(expected)
    assert message(written(tmp_path, "train.step")).startswith(expected)


def test_a_misspelt_group_is_suggested() -> None:
    with pytest.raises(ValueError, match="did you mean loss"):
        load_recipe("quickstart", "los=jsd")
