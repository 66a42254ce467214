"""Rows of Arrow data: parquet files, folders of ``save_to_disk``, data sets of the Hugging Face hub."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from opd.data.narrow_floats import narrow_columns, with_short_floats

if TYPE_CHECKING:
    import datasets

Row = tuple[str, Mapping[str, Any]]
ROWS_AT_ONCE = 1024
"""Rows that are held as Python objects at a time."""
_SAVED = ("state.json", "dataset_dict.json")
"""Files by which a folder of ``Dataset.save_to_disk`` and of ``DatasetDict.save_to_disk`` is known."""


def read_parquet(source: str, path: Path) -> Iterator[Row]:
    """(place, row) of a parquet file; rows count from 1."""
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.ParquetFile(path)
        batches = table.iter_batches(batch_size=ROWS_AT_ONCE)
        numbered = enumerate((row for batch in batches for row in batch.to_pylist()), start=1)
        narrow = narrow_columns(table.schema_arrow)
        for number, row in numbered:
            yield f"{source}: row {number}", with_short_floats(row, narrow)
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{source}: not a readable parquet file ({error})") from error


def is_saved(path: Path) -> bool:
    """Whether a folder was written by ``save_to_disk``."""
    return any((path / name).is_file() for name in _SAVED)


def read_saved(source: str, path: Path, split: str) -> Iterator[Row]:
    """(place, row) of a folder of ``save_to_disk``; of a DatasetDict those of ``split``."""
    import datasets

    try:
        found = datasets.load_from_disk(str(path))
    except Exception as error:  # of many classes, all for the user to act on
        raise ValueError(
            f"{source}: cannot be read as a folder of save_to_disk ({_words(error)}); "
            "write it again, or give a file"
        ) from error
    if isinstance(found, datasets.DatasetDict):
        if split not in found:
            raise ValueError(
                f"{source}: found no split {split!r}; the folder has {', '.join(map(str, found))}: name "
                "one with data.split or data.eval_split"
            )
        source, found = f"{source}[{split}]", found[split]
    yield from _rows(source, found)


def read_hub(
    source: str, split: str, subset: str | None, revision: str | None, streaming: bool
) -> Iterator[Row]:
    """(place, row) of a data set of the hub, or of a folder of data files."""
    import datasets

    # load_dataset raises many classes of errors, and all of them are for the user to act on.
    try:
        found = datasets.load_dataset(
            source, subset, split=split, revision=revision, streaming=streaming
        )
    except Exception as error:
        parts = (
            f"{f' of subset {subset!r}' if subset else ''}{f' at {revision!r}' if revision else ''}"
        )
        raise ValueError(
            f"{source}: cannot load split {split!r}{parts} ({_words(error)}); give a hub "
            "id with its subset, split and revision, or a file"
        ) from error
    assert isinstance(found, datasets.Dataset | datasets.IterableDataset)
    yield from _rows(f"{source}[{split}]", found)


def _words(error: Exception) -> str:
    """The error's own words on one line, the first of them where there are many."""
    words = " ".join(f"{type(error).__name__}: {error}".split())
    return words if len(words) <= 300 else f"{words[:300]} ..."


def _rows(place: str, found: "datasets.Dataset | datasets.IterableDataset") -> Iterator[Row]:
    """(place, row) of each row, numbered from 1."""
    features = found.features
    narrow = {} if features is None else narrow_columns(features.arrow_schema)
    for number, row in enumerate(found, start=1):
        assert isinstance(row, dict)
        yield f"{place}: row {number}", with_short_floats(row, narrow)
