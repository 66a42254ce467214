"""A masked weight inside a transformers model: same outputs, gradients where they are kept."""

import copy
import weakref
from contextlib import nullcontext

import pytest
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from opd.mask.file import Origin
from opd.mask.mask import Mask
from opd.train.compact import MaskedWeight
from opd.train.parameter_mask import SparseTraining
from opd.train.weights import full_weights, named_weights


@pytest.fixture
def model() -> Qwen2ForCausalLM:
    torch.manual_seed(0)
    return Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=61,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            tie_word_embeddings=True,
            max_position_embeddings=64,
        )
    )


def random_mask(model: torch.nn.Module) -> Mask:
    shapes = {name: tuple(weight.shape) for name, weight in named_weights(model)}
    indices = {
        name: (torch.rand(torch.Size(shape).numel()) < 0.3).nonzero()[:, 0].int()
        for name, shape in shapes.items()
    }
    return Mask(indices=indices, shapes=shapes, origin=Origin(rule="x", base="", model="x"))


def gradients(model: Qwen2ForCausalLM) -> None:
    ids = torch.arange(40).view(2, 20) % 61
    model(input_ids=ids, labels=ids, use_cache=False).loss.backward()


@pytest.mark.parametrize("checkpointing", [False, True])
def test_values_get_the_dense_gradient_at_their_coordinates(
    model: Qwen2ForCausalLM, checkpointing: bool
) -> None:
    mask = random_mask(model)
    dense = copy.deepcopy(model)
    gradients(dense)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})  # pyright: ignore
        model.train()
    SparseTraining(model, mask)
    gradients(model)
    expected = {name: weight.grad for name, weight in named_weights(dense)}
    masked = {
        id(module.frozen): parameterised.original.grad
        for parameterised in model.modules()
        if isinstance(parameterised, torch.nn.utils.parametrize.ParametrizationList)
        for module in parameterised
        if isinstance(module, MaskedWeight)
    }
    for name, weight in named_weights(model):
        grad = expected[name]
        assert grad is not None
        found = masked[id(weight)]
        torch.testing.assert_close(found, grad.flatten()[mask.indices[name].long()])


def test_handed_over_weights_have_hugging_face_names_and_the_same_bits(
    model: Qwen2ForCausalLM,
) -> None:
    before = {name: weight.detach().clone() for name, weight in named_weights(model)}
    SparseTraining(model, random_mask(model))
    after = dict(full_weights(model, lambda parameters: nullcontext()))
    assert list(after) == list(before)
    assert set(after) | {"lm_head.weight"} == set(Qwen2ForCausalLM(model.config).state_dict())
    for name in before:
        assert torch.equal(after[name], before[name])


def test_one_dense_gradient_lives_at_a_time(model: Qwen2ForCausalLM) -> None:
    SparseTraining(model, random_mask(model))
    alive: list[weakref.ref[torch.Tensor]] = []
    most = 0

    def seen(module: torch.nn.Module, grads: tuple[torch.Tensor, ...]) -> None:
        nonlocal most
        alive[:] = [each for each in alive if each() is not None]
        alive.append(weakref.ref(grads[0]))
        most = max(most, len(alive))

    for module in model.modules():
        if isinstance(module, MaskedWeight):
            module.register_full_backward_pre_hook(seen)  # pyright: ignore
    gradients(model)
    assert most == 1
