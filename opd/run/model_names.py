"""A run folder given as a model means the final model of the run."""

from pathlib import Path


def resolved_model(model: str) -> str:
    """The final model of a run folder; any other name as it is. ValueError for an unfinished run."""
    folder = Path(model)
    if not (folder / "metrics.jsonl").is_file() and not (folder / "final").is_dir():
        return model
    if not (folder / "final" / "config.json").is_file():
        raise ValueError(
            f"the run {model} has no final/ yet: let it finish, or name the folder of a model"
        )
    return str(folder / "final")
