"""Where the files lie that a recipe builds on: its own folder, and those of the bundled recipes."""

from pathlib import Path

RECIPE_FOLDERS = (
    Path(__file__).parent.parent / "recipes",  # installed
    Path(__file__).parent.parent.parent / "recipes",  # a clone
)


def search_path(recipe: Path) -> str:
    """The override with which a recipe can name files beside it, and bundled recipes, in its defaults."""
    folders = (str(folder).replace("'", "\\'") for folder in _source_folders(recipe))
    listed = ",".join(f"'file://{folder}'" for folder in folders)
    return f"hydra.searchpath=[{listed}]"


def _source_folders(recipe: Path) -> list[Path]:
    """Where the files lie that a recipe may build on: its own folder, then those of bundled recipes."""
    return [recipe.parent, *(f for f in RECIPE_FOLDERS if f.is_dir() and f != recipe.parent)]


def beside(recipe: Path, path: str) -> str:
    """``path`` beside the recipe, or, if it is only there, beside a bundled recipe that it builds on."""
    found = [folder / path for folder in _source_folders(recipe)]
    return str(next((place for place in found if place.exists()), found[0]))
