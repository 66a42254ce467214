"""Models of the Hub at a fixed revision: ``name@revision``."""

from opd.checkpoint.files import model_folder, split_revision
from opd.config.schema import Config
from opd.config.teacher import PoolTeacherConfig
from opd.run.recipe import Recipe, composed
from opd.teacher.connect import member_urls


def pinned(recipe: Recipe) -> Recipe:
    """The recipe with the folders of models given as ``name@revision`` among its overrides.

    They are downloaded; a folder's name ends with the commit. ValueError for a model or revision that is
    not accessible.
    """
    found = [
        f"{setting}='{pinned_model(model)}'"
        for setting, model in _models(recipe.config).items()
        if model is not None and pinned_model(model) != model
    ]
    return composed(recipe.path, [*recipe.overrides, *found]) if found else recipe


def pinned_model(model: str) -> str:
    """The folder of a model given as ``name@revision``, which is downloaded; any other name as it is."""
    return model if split_revision(model)[1] is None else str(model_folder(model))


def _models(config: Config) -> dict[str, str | None]:
    """The models of a run by their settings."""
    models = {"student.model": config.student.model, "teacher.model": config.teacher.model}
    if isinstance(config.teacher, PoolTeacherConfig):
        members = {n: m for n, m in config.teacher.members.items() if not member_urls(m)}
        models |= {f"teacher.members.{name}": model for name, model in members.items()}
    return models
