"""A setting is declared once, under one name, and a former name is refused with the present one."""

import importlib
import inspect
import pkgutil
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import MISSING as UNSET
from dataclasses import Field, fields, is_dataclass
from pathlib import Path
from typing import Any

import pytest

import opd.config
from opd.cli.main import run
from opd.config.fields import allowed, broken_bounds
from opd.config.schema import FORMER_NAMES, GROUPS
from opd.run.recipe_errors import known_keys

ON_PURPOSE = {
    "optim.lr": {"OptimConfig": 1e-6, "SGDConfig": 1e-2},
    "rollout.dtype": {"RolloutConfig": "auto", "RolloutServerConfig": "bfloat16"},
    "rollout.gpu_memory_utilization": {"VllmEngineConfig": 0.35, "RolloutServerConfig": 0.8},
    "rollout.on_policy": {"RolloutConfig": 1.0, "DatasetRolloutConfig": 0.0},
    "teacher.gpu_memory_utilization": {"TeacherEngineConfig": 0.45, "TeacherServerConfig": 0.8},
    "teacher.model": {"TeacherConfig": None, "TeacherServerConfig": "???"},
}
"""Settings whose default depends on the choice; a server has a GPU to itself and needs a model."""


def declarations() -> Iterator[tuple[str, type, Field[Any]]]:
    """(file, class, field) of every setting, where it is declared and not where it is inherited."""
    for module in pkgutil.iter_modules(opd.config.__path__):
        room = importlib.import_module(f"opd.config.{module.name}")
        for kind in vars(room).values():
            if is_dataclass(kind) and isinstance(kind, type) and kind.__module__ == room.__name__:
                yield from ((module.name, kind, f) for f in fields(kind) if f.name in own(kind))


def own(kind: type) -> dict[str, Any]:
    return inspect.get_annotations(kind)


def default(field: Field[Any]) -> Any:
    return field.default if field.default_factory is UNSET else field.default_factory()


def test_no_two_classes_of_a_group_give_a_setting_different_defaults() -> None:
    found: dict[str, dict[str, Any]] = defaultdict(dict)
    for room, kind, field in declarations():
        found[f"{room}.{field.name}"][kind.__name__] = default(field)
    several = {
        setting: defaults
        for setting, defaults in found.items()
        if any(value != next(iter(defaults.values())) for value in defaults.values())
    }
    assert several == ON_PURPOSE
    assert len(found) > 150, "every group was read"


def test_defaults_lie_within_their_bounds() -> None:
    for choices in GROUPS.values():
        for choice in choices.values():
            node = choice() if isinstance(choice, type) else choice
            broken = [sentence for sentence in broken_bounds(node) if "is not set" not in sentence]
            assert broken == []


def test_every_bound_allows_something() -> None:
    bounded = [
        f for _, _, f in declarations() if {"least", "above", "most", "below"} & {*f.metadata}
    ]
    assert len(bounded) > 50
    for field in bounded:
        low = max(field.metadata.get(name, float("-inf")) for name in ("least", "above"))
        high = min(field.metadata.get(name, float("inf")) for name in ("most", "below"))
        assert low <= high, f"{field.name} {allowed(field)}"


def test_a_former_name_leads_to_a_present_setting_and_is_none_itself() -> None:
    present = set(known_keys())
    assert FORMER_NAMES
    assert set(FORMER_NAMES.values()) <= present
    assert not FORMER_NAMES.keys() & present


@pytest.mark.parametrize("former", FORMER_NAMES)
def test_a_former_name_is_refused_on_the_command_line_and_in_a_recipe(
    former: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    expected = f"opd: {former} is now called {FORMER_NAMES[former]}: use that name\n"
    group, name = former.split(".")
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(f"defaults:\n  - base\n  - _self_\n{group}: {{{name}: 1}}\n")
    folder = f"run.dir={tmp_path / 'run'}"
    for arguments in (["quickstart", f"{former}=1"], [str(recipe)]):
        assert run(["train", *arguments, folder]) == 2
        assert capsys.readouterr().err == expected
    assert not (tmp_path / "run").exists()
