"""Tied tensors count once: a head that repeats the embedding is no tensor of its own."""

import warnings
from collections.abc import Mapping
from pathlib import Path

import torch

from opd.checkpoint.family import is_tied, read_family
from opd.checkpoint.names import place
from opd.checkpoint.stored import Stored, is_equal


def without_tied(tensors: Mapping[str, Stored], folder: Path) -> dict[str, Stored]:
    """The tensors that transformers loads as weights of their own.

    Where the config (or the default of its family) ties head and embedding, transformers ties them if
    both are stored with equal values, or if one of the two is absent. A head with other values stays
    untied, and is a tensor of its own, with a warning. A head that is stored alone is the embedding.
    """
    found = dict(tensors)
    outside = [name for name, stored in tensors.items() if _is_table(name, stored)]
    heads = [name for name in outside if place(name).block == "head"]
    shapes = [tensors[name].shape for name in outside]
    if not heads and len(set(shapes)) == len(shapes):
        return found
    if not is_tied(folder):
        return found
    for head, embedding in tied_names(folder, outside).items():
        if head not in found:
            continue
        if embedding not in found:
            found[embedding] = found.pop(head)
        elif _is_repeated(found[head], found[embedding]):
            del found[head]
        else:
            warnings.warn(
                f"{folder} ties {head} to {embedding} and stores both with different values, so that "
                "transformers does not tie them: write tie_word_embeddings=false into config.json, "
                "or other programs will drop the head",
                stacklevel=2,
            )
    return found


def tied_names(folder: Path, names: list[str]) -> dict[str, str]:
    """(head, embedding) of a model that ties them, under the names that are stored.

    A family that transformers does not know, or whose names have a wrapper's prefix, is read by the
    names of its tensors.
    """
    family = read_family(folder)
    ties = {} if family is None else family.ties(names)
    if not ties.keys().isdisjoint(names) or not set(ties.values()).isdisjoint(names):
        return ties
    heads = [name for name in names if place(name).block == "head"]
    embeddings = [name for name in names if place(name).block == "embedding"]
    return dict(zip(heads, embeddings, strict=False)) if len(heads) == len(embeddings) == 1 else {}


def _is_table(name: str, stored: Stored) -> bool:
    """Whether a tensor may be an embedding or a head: a matrix outside the layers."""
    return len(stored.shape) == 2 and place(name).layer is None


def _is_repeated(head: Stored, embedding: Stored) -> bool:
    if head.shape != embedding.shape:
        return False
    shared: torch.Tensor = embedding.read()
    return is_equal(head.read().to(shared.dtype), shared)
