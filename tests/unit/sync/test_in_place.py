"""Overwriting in place, with vLLM's own loader, on a model that a CPU can hold; real engines need CUDA."""

from typing import Any

import numpy as np
import pytest
import torch

from opd.sync.in_place import load_in_place
from opd.sync.replica import Change

pytest.importorskip("vllm")


class FusedModel(torch.nn.Module):
    """k and v live in one parameter, as in vLLM's fused modules."""

    def __init__(self) -> None:
        super().__init__()
        self.kv = torch.nn.Parameter(torch.arange(24.0).view(6, 4).bfloat16())

    def load_weights(self, weights: Any) -> set[str]:
        for name, tensor in weights:
            rows = slice(0, 3) if name == "k" else slice(3, 6)
            self.kv.data[rows].copy_(tensor)
        return {"kv"}


class Worker:
    """What ``collective_rpc`` hands to a function."""

    def __init__(self, model: FusedModel) -> None:
        self.model = model

    def get_model(self) -> FusedModel:
        return self.model


class Llm:
    """The two methods of vLLM's LLM that a patch needs."""

    def __init__(self, model: FusedModel) -> None:
        self.worker = Worker(model)
        self.resets = 0

    def collective_rpc(self, method: Any, args: tuple[Any, ...]) -> None:
        method(self.worker, *args)

    def reset_prefix_cache(self) -> None:
        self.resets += 1


class Whole:
    """Records the versions that were loaded whole."""

    def __init__(self) -> None:
        self.versions: list[int] = []

    def push(self, weights: Any, version: int) -> dict[str, float]:
        self.versions.append(version)
        return {}


def bits(*values: float) -> np.ndarray:
    return torch.tensor(values).bfloat16().view(torch.int16).numpy()


def test_only_the_named_coordinates_change_and_nan_is_loaded_whole() -> None:
    model, whole, marks = FusedModel(), Whole(), []
    llm = Llm(model)
    load = load_in_place(llm, whole, mark=marks.append)  # pyright: ignore[reportArgumentType]
    tensors = {n: torch.zeros(3, 4).bfloat16() for n in ("k", "v")}
    expected = model.kv.detach().clone()
    expected[0, 1], expected[5, 3] = 100.0, -7.0
    changes = [
        Change("k", np.array([1]), bits(100.0)),
        Change("v", np.array([11]), bits(-7.0)),
    ]
    load(tensors, changes, 3)
    assert torch.equal(model.kv, expected)
    assert (llm.resets, marks, whole.versions) == (1, [3], [])
    load(tensors, [Change("k", np.array([0]), bits(float("nan")))], 4)
    load(tensors, [Change("k", None, bits(*[0.0] * 12))], 5)
    assert whole.versions == [4, 5]
    assert torch.equal(model.kv, expected)
