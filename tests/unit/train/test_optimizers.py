"""States that are created beforehand change no bit of what an optimizer does."""

import pytest
import torch

from opd.train.optimizers import create_states

MOMENTUM = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.0}


def make(name: str, parameters: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
    match name:
        case "adamw":
            return torch.optim.AdamW(parameters, lr=0.1, weight_decay=0.1)
        case "nesterov":
            return torch.optim.SGD(parameters, nesterov=True, **MOMENTUM)
        case "sgd":
            return torch.optim.SGD(parameters, lr=0.1)
    return torch.optim.SGD(parameters, **MOMENTUM)


def trained(name: str, *, beforehand: bool) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Weights after 3 steps as bits, and the state of the optimizer; zeros of both signs everywhere."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.nn.Parameter(torch.randn(64, generator=generator))
    with torch.no_grad():
        weight[:16] = -0.0
        weight[16:32] = 0.0
    optimizer = make(name, [weight])
    if beforehand:
        create_states(optimizer, [weight])
    for _ in range(3):
        weight.grad = torch.randn(64, generator=generator)
        weight.grad[::3] = -0.0
        weight.grad[1::3] = 0.0
        optimizer.step()
    return weight.detach().view(torch.int32).clone(), dict(optimizer.state[weight])


@pytest.mark.parametrize("name", ["adamw", "momentum", "nesterov", "sgd"])
def test_states_created_beforehand_change_no_bit(name: str) -> None:
    expected, lazy = trained(name, beforehand=False)
    found, states = trained(name, beforehand=True)
    assert torch.equal(found, expected)
    assert {n: s for n, s in states.items() if s is not None}.keys() == {
        n for n, s in lazy.items() if s is not None
    }
    for key, tensor in lazy.items():
        if tensor is not None:
            assert torch.equal(states[key].view(torch.int32), tensor.view(torch.int32)), key
            assert states[key].dtype == tensor.dtype
