"""Hydra stops here: a recipe and overrides become a typed ``Config``."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

import yaml
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig, OmegaConf

from opd.config.schema import GROUPS, Config, register

CONF = "pkg://opd.conf"
METHODS = Path(__file__).parent.parent / "conf" / "method"
RECIPE_FOLDERS = (
    Path(__file__).parent.parent / "recipes",  # installed
    Path(__file__).parent.parent.parent / "recipes",  # a clone
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Composed:
    """A recipe with its overrides applied: typed, as a plain dictionary, and what chose it."""

    config: Config
    plain: dict[str, Any]
    choices: dict[str, str]
    recipe: Path
    overrides: list[str]


def find_recipe(name: str) -> Path:
    """A path, or the name of a recipe that came with opd. Raises ValueError with the names there are."""
    path = Path(name)
    if path.suffix in (".yaml", ".yml"):
        if path.is_file():
            return path.resolve()
        raise ValueError(f"there is no recipe at {name}: give a path to a YAML file")
    for folder in RECIPE_FOLDERS:
        packaged = folder / f"{name}.yaml"
        if packaged.is_file():
            return packaged.resolve()
    raise ValueError(
        f"there is no recipe named {name}: allowed are a path to a .yaml file or one of "
        f"{', '.join(sorted(packaged_recipes()))}"
    )


def packaged_recipes() -> dict[str, Path]:
    """The recipes that came with opd, by name."""
    return {p.stem: p for folder in RECIPE_FOLDERS for p in folder.glob("*.yaml")}


def prepare(recipe: Path) -> None:
    """Register schema and group choices, and let ``${here:x}`` in a recipe mean x beside it.

    ``${choice:optim,{sgd:0.1,else:1e-3}}`` is the value for the group's choice (see ``typed``), so
    that ``optim=sgd`` alone brings a learning rate that suits it.
    """
    register()
    OmegaConf.register_new_resolver("here", lambda path: str(recipe.parent / path), replace=True)


def hydra_arguments(recipe: Path) -> list[str]:
    """What tells Hydra to use a recipe as its primary config."""
    return [
        f"--config-dir={recipe.parent}",
        f"--config-name={recipe.stem}",
        f"hydra.searchpath=[{CONF}]",
        "hydra/job_logging=none",
        "hydra/hydra_logging=none",
    ]


def composed(recipe: Path, overrides: Sequence[str]) -> Composed:
    """Compose without running; for workers, tests and checks."""
    prepare(recipe)
    overrides = with_method(overrides)
    outer = GlobalHydra.instance().hydra
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(recipe.parent), version_base="1.3"):
        cfg = compose(
            recipe.stem,
            [f"hydra.searchpath=[{CONF}]", *overrides],
            return_hydra_config=True,
        )
    GlobalHydra.instance().hydra = outer
    return typed(cfg, cfg.hydra.runtime.choices, recipe, overrides)


def with_method(overrides: Sequence[str]) -> list[str]:
    """What a ``method=NAME`` among them chooses is put before them, so that it rules the recipe.

    In a recipe's own defaults list a method only fills in what the recipe leaves open.
    """
    named = [o.removeprefix("method=") for o in overrides if o.startswith("method=")]
    if not named or "," in named[-1]:
        return list(overrides)
    file = METHODS / f"{named[-1]}.yaml"
    if not file.is_file():
        allowed = ", ".join(sorted(p.stem for p in METHODS.glob("*.yaml")))
        raise ValueError(f"there is no method={named[-1]}: allowed are {allowed}")
    said = yaml.safe_load(file.read_text())
    choices = [entry for line in said.pop("defaults", []) for entry in line.items()]
    groups = [f"{key.removeprefix('override /')}={name}" for key, name in choices]
    del said["method"]
    said["rollout"] = {"on_policy": 1.0} | said.get("rollout", {})
    values = [f"{room}.{key}={v}" for room, keys in said.items() for key, v in keys.items()]
    fresh = [o for o in [*groups, *values] if o not in overrides]
    return [*fresh, *overrides]


def typed(cfg: DictConfig, choices: Any, recipe: Path, overrides: Sequence[str]) -> Composed:
    """A ``Config`` out of what Hydra composed."""
    bare = cfg.copy()
    OmegaConf.set_struct(bare, False)
    bare.pop("hydra", None)
    if "run" in bare and bare.run.name == "run":
        bare.run.name = recipe.stem

    def choice(group: str, values: dict[str, Any]) -> Any:
        return values[choices[group] if choices[group] in values else "else"]

    OmegaConf.register_new_resolver("choice", choice, replace=True)
    config = OmegaConf.to_object(bare)
    assert isinstance(config, Config)
    plain = OmegaConf.to_container(bare, resolve=True, throw_on_missing=False)
    assert isinstance(plain, dict)
    return Composed(
        config=config,
        plain=_yaml_ready(plain),
        choices={group: str(choices[group]) for group in (*GROUPS, "method")},
        recipe=recipe,
        overrides=list(overrides),
    )


def _yaml_ready(value: Any) -> Any:
    """Enumerations as their names."""
    match value:
        case dict():
            return {str(k): _yaml_ready(v) for k, v in value.items()}
        case list():
            return [_yaml_ready(v) for v in value]
        case StrEnum():
            return value.value
    return value


def run_folder(composed: Composed, sweep_job: str | None = None) -> Path:
    """run.dir, by default runs/<name>; a job of a sweep gets a folder of its own below it."""
    folder = Path(composed.config.run.dir or os.path.join("runs", composed.config.run.name))
    return folder / sweep_job if sweep_job else folder
