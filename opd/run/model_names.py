"""A run folder or a recipe's name, given as a model, means the final model of the run or the student."""

from pathlib import Path

from opd.run.recipe import bundled_recipes, find_recipe, load_recipe

CONFIG = "config.yaml"
RECIPE_SUFFIXES = (".yaml", ".yml")


def resolved_model(model: str) -> str:
    """The final model of a run folder, the student of a recipe; any other name as it is.

    A folder comes before a bundled recipe of its name. ValueError for an unfinished run.
    """
    folder = Path(model)
    if not folder.exists() and model in bundled_recipes():
        return load_recipe(model).config.student.model
    if folder.suffix in RECIPE_SUFFIXES and folder.is_file():
        return load_recipe(find_recipe(model)).config.student.model
    if not (folder / "metrics.jsonl").is_file() and not (folder / "final").is_dir():
        return model
    if not (folder / "final" / "config.json").is_file():
        raise ValueError(
            f"the run {model} has no final/ yet: let it finish, name one of its checkpoints/ (which "
            "`opd eval` and `opd export` read), or the folder of a model"
        )
    return str(folder / "final")


def find_base(trained: str, base: str | None) -> str:
    """``base``; by default the student that the run ``trained`` started from.

    ValueError when ``trained`` is not the folder of a run, or of something in it.
    """
    if base is not None:
        return resolved_model(base)
    written = recipe_file(trained)
    if written is not None:
        return load_recipe(written).config.student.model
    raise ValueError(
        f"base=... is missing, and trained={trained} is not a run folder that names it: give the folder "
        "or Hub id of the model that training started from"
    )


def recipe_file(model: str) -> Path | None:
    """The settings (config.yaml) of the run that a model belongs to; None where it belongs to none."""
    folder = Path(model)
    for run in (folder, *folder.absolute().parents[:2]):
        if (run / CONFIG).is_file() and (run / "metrics.jsonl").is_file():
            return run / CONFIG
    return None
