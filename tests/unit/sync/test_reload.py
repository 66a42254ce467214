"""A reload reaches weights that a family writes into its parameters without their loaders."""

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from vllm.model_executor.model_loader.reload import layerwise
from vllm.model_executor.model_loader.weight_utils import default_weight_loader

from opd.sync.reload import reload

NAMES = ("experts.direct", "experts.loaded", "sinks", "linear.weight")


class Experts(nn.Module):
    """One parameter is written into directly, one by its loader."""

    def __init__(self) -> None:
        super().__init__()
        self.direct = nn.Parameter(torch.zeros(2, 3, 4), requires_grad=False)
        self.loaded = nn.Parameter(torch.zeros(5), requires_grad=False)


class Model(nn.Module):
    """Loads as vLLM's GPT-OSS does: part by part, transposed, and through ``.data``."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = Experts()
        self.sinks = nn.Parameter(torch.zeros(4), requires_grad=False)
        self.linear = nn.Linear(3, 2, bias=False).requires_grad_(False)

    def load_weights(self, weights: Iterator[tuple[str, torch.Tensor]]) -> set[str]:
        parameters = dict(self.named_parameters())
        for name, weight in weights:
            parameter: Any = parameters[name]
            if name == "experts.direct":
                for expert in range(2):
                    parameter[expert].copy_(weight[expert].t())
            elif name == "sinks":
                parameter.data.copy_(weight)
            else:
                getattr(parameter, "weight_loader", default_weight_loader)(parameter, weight)
        return set(parameters)


class Worker:
    """As far as a reload asks it."""

    device = torch.device("cpu")

    def __init__(self) -> None:
        self.model = Model()
        layerwise.record_metadata_for_reloading(self.model)

    def get_model(self) -> Model:
        return self.model

    def reload_weights(self, weights_iterator: Iterator[tuple[str, torch.Tensor]]) -> None:
        layerwise.initialize_layerwise_reload(self.model)
        self.model.load_weights(weights_iterator)
        layerwise.finalize_layerwise_reload(self.model, SimpleNamespace(dtype=torch.float32))


def weights(seed: int) -> dict[str, torch.Tensor]:
    torch.manual_seed(seed)
    sizes: dict[str, tuple[int, ...]] = {
        "experts.direct": (2, 4, 3),
        "experts.loaded": (5,),
        "sinks": (4,),
        "linear.weight": (2, 3),
    }
    return {name: torch.randn(sizes[name]) for name in NAMES}


def held(worker: Worker) -> dict[str, torch.Tensor]:
    found = {name: p.detach().clone() for name, p in worker.model.named_parameters()}
    found["experts.direct"] = found["experts.direct"].transpose(1, 2)
    return found


def unequal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> list[str]:
    return [name for name in NAMES if not torch.equal(found[name], expected[name])]


def test_every_weight_is_that_of_the_last_push_in_the_tensors_of_the_engine() -> None:
    worker = Worker()
    tensors = {name: p.data_ptr() for name, p in worker.model.named_parameters()}
    for seed in (0, 1):
        pushed = weights(seed)
        assert reload(worker, iter(pushed.items()), observe=True)
        assert unequal(held(worker), pushed) == []
    assert tensors == {name: p.data_ptr() for name, p in worker.model.named_parameters()}


def test_without_observation_direct_writes_are_lost() -> None:
    """Else the observation is not needed any more."""
    worker, pushed = Worker(), weights(0)
    assert not reload(worker, iter(pushed.items()), observe=False)
    assert "sinks" in unequal(held(worker), pushed)


@pytest.mark.parametrize("name", ["linear.weight"])
def test_a_model_with_loaders_only_needs_no_observation(name: str) -> None:
    worker, pushed = Worker(), {name: weights(0)[name]}
    assert not reload(worker, iter(pushed.items()), observe=True)
    assert torch.equal(worker.model.linear.weight, pushed[name])
