"""What may be given as a model: a folder, a hub id, a run, one of its checkpoints, or a recipe."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from opd.run.recipe import Recipe, bundled_recipes, load_recipe

CHECKPOINTS = "checkpoints"
MANIFEST = "manifest.json"


def resolved_model(model: str) -> str:
    """The folder or hub id of a model: of a run folder its final model, of a recipe its student.

    ValueError for an unfinished run, and for a checkpoint, which is no plain model (``opened_model``).
    """
    folder = Path(model)
    if is_checkpoint(folder):
        raise ValueError(
            f"{model} holds the training state of a run: make a model folder of it with "
            f"`opd export model={model} out=FOLDER`, and name that"
        )
    if _is_run(folder):
        if not (folder / "final" / "config.json").is_file():
            raise ValueError(
                f"the run {model} has no final/ yet: let it finish, or name one of its checkpoints/"
            )
        return str(folder / "final")
    if folder.suffix in (".yaml", ".yml") or (not folder.exists() and model in bundled_recipes()):
        return load_recipe(model).config.student.model
    return model


@contextmanager
def opened_model(model: str) -> Iterator[str]:
    """The same, where a checkpoint of a run may be given too: inside, a model folder is made of it."""
    if not is_checkpoint(Path(model)):
        yield resolved_model(model)
        return
    from opd.run.export import export  # its training code is not needed for other models

    with TemporaryDirectory(prefix="opd-model-") as folder:
        out = Path(folder) / "model"
        export(model, out)
        yield str(out)


def is_checkpoint(folder: Path) -> bool:
    """Whether it is a checkpoint in a run folder, such as runs/x/checkpoints/step_000100."""
    return folder.parent.name == CHECKPOINTS and (folder / MANIFEST).is_file()


def run_of(model: str) -> Path | None:
    """The run folder that a model belongs to: it is given, or its final/, or one of its checkpoints."""
    folder = Path(model)
    of_checkpoint = folder.parent.parent if is_checkpoint(folder) else None
    of_final = folder.parent if folder.name == "final" else None
    for found in (of_checkpoint, of_final, folder):
        if found is not None and (found / "config.yaml").is_file():
            return found
    return None


def recipe_of(model: str, *overrides: str) -> Recipe:
    """The recipe of the run that a model belongs to, with overrides. ValueError when it belongs to none."""
    run = run_of(model)
    if run is None:
        raise ValueError(
            f"{model} is no run folder and no checkpoint of a run, so it has no recipe: name one"
        )
    return load_recipe(run / "config.yaml", *overrides)


def given_base(base: str | None, trained: str) -> str:
    """The folder or hub id of ``base``, by default what the run ``trained`` started from."""
    return base_of(trained) if base is None else resolved_model(base)


def base_of(trained: str) -> str:
    """The model that the run of ``trained`` started from. ValueError when it belongs to no run."""
    if run_of(trained) is None:
        raise ValueError(
            f"base=... is missing, and trained={trained} is no run, whose own base is used: give the model "
            "that training started from"
        )
    return recipe_of(trained).config.student.model


def _is_run(folder: Path) -> bool:
    return (folder / "metrics.jsonl").is_file() or (folder / "final").is_dir()
