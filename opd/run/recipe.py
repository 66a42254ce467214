"""A recipe and overrides become a typed ``Config``; the only place that composes with Hydra."""

import os
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

import hydra
import yaml
from hydra import compose, initialize_config_module
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException, OverrideParseException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from opd.config.schema import GROUPS, Config, register
from opd.run.recipe_errors import (
    added_keys,
    explain,
    require_present_names,
    unknown_setting,
    unreadable,
)
from opd.run.recipe_files import RECIPE_FOLDERS, beside, search_path
from opd.run.recipe_functions import find_functions
from opd.run.recipe_limits import read_variable, require_own_targets

CONF = "pkg://opd.conf"
PRIMARY = (
    "opd recipe"  # the recipe's name for Hydra: whatever its file is called, it shadows nothing
)
METHODS = Path(__file__).parent.parent / "conf" / "method"


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """A recipe with its overrides applied.

    ``config`` is typed; ``plain`` is the same as a dictionary that YAML can hold; ``choices`` names
    the option chosen in each group; ``path`` is the recipe's file.
    """

    config: Config
    plain: dict[str, Any]
    choices: dict[str, str]
    path: Path
    overrides: list[str]


def load_recipe(recipe: str | Path, *overrides: str) -> Recipe:
    """Compose a recipe (a path, or the name of a bundled one) with overrides such as ``loss=jsd``.

    Nothing is run or loaded. Raises ValueError with one sentence for a configuration error.
    """
    return composed(find_recipe(str(recipe)), overrides)


def find_recipe(name: str) -> Path:
    """The file of a recipe: a path, or the name of a bundled one. ValueError lists the bundled names."""
    path = Path(name)
    if path.suffix in (".yaml", ".yml"):
        if path.is_file():
            return path.resolve()
        raise ValueError(f"there is no recipe at {name}: give a path to a YAML file")
    for folder in RECIPE_FOLDERS:
        bundled = folder / f"{name}.yaml"
        if bundled.is_file():
            return bundled.resolve()
    raise ValueError(
        f"there is no recipe named {name}: allowed are a path to a .yaml file or one of "
        f"{', '.join(sorted(bundled_recipes()))}"
    )


def bundled_recipes() -> dict[str, Path]:
    """The recipes that come with opd, by name."""
    return {p.stem: p for folder in RECIPE_FOLDERS for p in folder.glob("*.yaml")}


def composed(recipe: Path, overrides: Sequence[str]) -> Recipe:
    """Compose without running. Raises ValueError with one sentence for a configuration error."""
    overrides = with_method(overrides)
    require_present_names(overrides)
    _prepare(recipe)
    outer = GlobalHydra.instance().hydra
    GlobalHydra.instance().clear()
    try:
        cfg = _compose(recipe, overrides)
        return _typed(cfg, cfg.hydra.runtime.choices, recipe, overrides)
    except OverrideParseException as error:
        raise ValueError(unreadable(str(error.override))) from None
    except (HydraException, OmegaConfBaseException) as error:
        raise ValueError(explain(error)) from error
    finally:
        GlobalHydra.instance().hydra = outer


def _compose(recipe: Path, overrides: Sequence[str]) -> DictConfig:
    """What Hydra composes; ValueError when it would run code that is not Hydra's."""
    # the bundled defaults come first, so that a file base.yaml beside the recipe is not taken for them
    with initialize_config_module(CONF.removeprefix("pkg://"), version_base="1.3"):
        cfg = compose(PRIMARY, [search_path(recipe), *overrides], return_hydra_config=True)
    require_own_targets(OmegaConf.to_container(cfg.hydra, resolve=False))
    return cfg


def sweep(recipe: Path, overrides: Sequence[str], job: Callable[[Recipe, str], None]) -> None:
    """Call ``job`` with every combination of comma-separated overrides and a name for it.

    Hydra's sweeper and launcher are used, so ``hydra/launcher=...`` works.
    """
    overrides = with_method(overrides)
    require_present_names(overrides)
    _prepare(recipe)
    hydra_overrides = [o for o in overrides if o.lstrip("+").startswith("hydra")]

    def one(_: DictConfig) -> None:
        hydra_config = HydraConfig.get()
        own = list(hydra_config.overrides.task)
        job(composed(recipe, own), job_name(own, overrides, hydra_config.job.num))

    command_line = sys.argv
    sys.argv = ["opd train", "--multirun", *_hydra_arguments(recipe), *overrides]
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra raises, instead of printing and exiting with 1
    try:
        _compose(recipe, hydra_overrides)
        GlobalHydra.instance().clear()
        hydra.main(version_base="1.3", config_path=CONF)(one)()
    except OverrideParseException as error:
        raise ValueError(unreadable(str(error.override))) from None
    except (HydraException, OmegaConfBaseException) as error:
        raise ValueError(explain(error)) from error
    finally:
        sys.argv = command_line


def job_name(own: Sequence[str], given: Sequence[str], number: int) -> str:
    """A folder name from the overrides that vary in a sweep: optim=sgd,optim.lr=0.01"""
    fixed = [value for o in given if not (value := _parsed(o)).is_sweep_override()]
    common = [(o.get_key_element(), o.value()) for o in fixed]
    varied: list[str] = []
    for text in own:
        override = _parsed(text)
        if (override.get_key_element(), override.value()) not in common:
            varied.append(re.sub(r"\\(.)", r"\1", text))  # without Hydra's escapes
    return ",".join(varied).replace("/", "_") or f"job_{number}"


def _parsed(override: str) -> Override:
    """What Hydra reads; it writes a job's overrides otherwise than given (false as False, : as \\:)."""
    return OverridesParser.create().parse_override(override)


def _prepare(recipe: Path) -> None:
    """Register schema, group choices and the recipe, and resolve ``${here:x}`` (see ``_beside``).

    ``${choice:optim,{sgd:0.1,else:1e-3}}`` is the value for the group's choice (see ``_typed``), so
    that ``optim=sgd`` alone comes with a suitable learning rate.
    """
    register()
    try:
        content = OmegaConf.load(recipe)
    except (yaml.YAMLError, OSError, UnicodeDecodeError) as error:
        words = " ".join(str(error).split())
        raise ValueError(f"{recipe} cannot be read as YAML ({words}): correct it") from error
    if not isinstance(content, DictConfig):
        raise ValueError(f"{recipe} holds a list: a recipe is a mapping of settings")
    if {"config", "choices"} <= content.keys():
        content = _recipe_of_a_run(content)
    ConfigStore.instance().store(name=PRIMARY, node=content)
    OmegaConf.register_new_resolver("here", lambda path: beside(recipe, path), replace=True)
    OmegaConf.register_new_resolver("oc.env", read_variable, replace=True)


def _recipe_of_a_run(description: DictConfig) -> DictConfig:
    """The config.yaml of a run folder as a recipe: its group choices, then its settings."""
    overridden = [
        {f"override {group}": choice}
        for group, choice in description.choices.items()
        if group in GROUPS
    ]
    settings = OmegaConf.create(description.config)
    return OmegaConf.merge({"defaults": ["base", *overridden, "_self_"]}, settings)  # pyright: ignore


def _hydra_arguments(recipe: Path) -> list[str]:
    """Arguments that make a recipe the primary config of Hydra."""
    return [
        f"--config-name={PRIMARY}",
        search_path(recipe),
        "hydra/job_logging=none",
        "hydra/hydra_logging=none",
    ]


def with_method(overrides: Sequence[str]) -> list[str]:
    """The overrides with the choices of ``method=NAME`` before them, so that they override the recipe.

    In the defaults list of a recipe, a method only sets what the recipe leaves open.
    """
    named = [o.removeprefix("method=") for o in overrides if o.startswith("method=")]
    if not named or "," in named[-1]:
        return list(overrides)
    file = METHODS / f"{named[-1]}.yaml"
    if not file.is_file():
        allowed = ", ".join(sorted(p.stem for p in METHODS.glob("*.yaml")))
        raise ValueError(f"there is no method={named[-1]}: allowed are {allowed}")
    method = yaml.safe_load(file.read_text())
    choices = [entry for line in method.pop("defaults", []) for entry in line.items()]
    groups = [f"{key.removeprefix('override /')}={name}" for key, name in choices]
    del method["method"]
    method["rollout"] = {"on_policy": 1.0} | method.get("rollout", {})
    values = [f"{room}.{key}={v}" for room, keys in method.items() for key, v in keys.items()]
    fresh = [o for o in [*groups, *values] if o not in overrides]
    return [*fresh, *overrides]


def _typed(cfg: DictConfig, choices: Any, recipe: Path, overrides: Sequence[str]) -> Recipe:
    """The ``Recipe`` of what Hydra composed."""
    bare = cfg.copy()
    OmegaConf.set_struct(bare, False)
    bare.pop("hydra", None)
    if "run" in bare and bare.run.name == "run":
        bare.run.name = recipe.stem

    def choice(group: str, values: dict[str, Any]) -> Any:
        return values[choices[group] if choices[group] in values else "else"]

    OmegaConf.register_new_resolver("choice", choice, replace=True)
    unset = sorted(OmegaConf.missing_keys(bare))
    if unset:
        raise ValueError(
            "; ".join(f"{k} is not set: give it in the recipe or as {k}=..." for k in unset)
        )
    added = next(added_keys(bare, ""), None)
    if added is not None:
        raise ValueError(unknown_setting(added))
    find_functions(bare, recipe.parent)
    config = OmegaConf.to_object(bare)
    if not isinstance(config, Config):
        raise ValueError(
            f"{recipe} does not build on the defaults of opd: begin it with `defaults: [base, _self_]`"
        )
    plain = OmegaConf.to_container(bare, resolve=True, throw_on_missing=False)
    assert isinstance(plain, dict)
    return Recipe(
        config=config,
        plain=_yaml_ready(plain),
        choices={group: str(choices[group]) for group in (*GROUPS, "method")},
        path=recipe,
        overrides=list(overrides),
    )


def _yaml_ready(value: Any) -> Any:
    """The same structure with enumerations as their names."""
    match value:
        case dict():
            return {str(k): _yaml_ready(v) for k, v in value.items()}
        case list():
            return [_yaml_ready(v) for v in value]
        case StrEnum():
            return value.value
    return value


def run_folder(recipe: Recipe, sweep_job: str | None = None) -> Path:
    """run.dir, by default runs/<name>; a job of a sweep gets a folder of its own below it."""
    folder = Path(recipe.config.run.dir or os.path.join("runs", recipe.config.run.name))
    return folder / sweep_job if sweep_job else folder
