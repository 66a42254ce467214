"""Every known leak of mask training, planted, is caught; the real thing has none.

Leaks read in other projects (docs/masks.md lists them): decoupled weight decay moves frozen weights;
momentum left over from before the mask; ``p.data[mask].add_()`` writes a copy; whole blocks are
written; multiplication lets Inf x 0 = NaN through; the gradient norm counts frozen coordinates; empty
masks, 1-D tensors and tied weights take another path.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from opd.config.optim import AdamWConfig, OptimConfig, SGDConfig
from opd.config.train import Precision
from opd.mask.file import Origin
from opd.mask.mask import Mask
from opd.train import parameter_mask
from opd.train.compact import MaskedWeight
from opd.train.optimizers import build_optimizer
from opd.train.parameter_mask import DenseTraining, ParameterMask, RestoredTraining, SparseTraining
from opd.train.torch_engine import TorchEngine
from opd.train.weights import named_weights

STEPS, CLIP, LR, VOCAB, WIDTH = 6, 0.5, 0.05, 13, 8
EMPTY, FULL = "hidden.weight", "second.weight"


class Poison(torch.autograd.Function):
    """Nothing in the forward pass; an infinite gradient at one coordinate in the backward pass."""

    @staticmethod
    def forward(ctx: Any, weight: torch.Tensor, coordinate: int) -> torch.Tensor:
        ctx.coordinate = coordinate
        return weight.clone()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        grad = grad.clone()
        grad.view(-1)[ctx.coordinate] = float("inf")
        return grad, None


class Tiny(nn.Module):
    """Embedding tied to the head, a norm, biases, matrices, and one infinite gradient."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(VOCAB, WIDTH)
        self.hidden = nn.Linear(WIDTH, WIDTH)
        self.norm = nn.LayerNorm(WIDTH)
        self.second = nn.Linear(WIDTH, WIDTH, bias=False)
        self.third = nn.Linear(WIDTH, WIDTH, bias=False)
        self.head = nn.Linear(WIDTH, VOCAB, bias=False)
        self.head.weight = self.embed.weight
        kept = set(tiny_mask(self).indices["third.weight"].tolist())
        self.poisoned = next(i for i in range(WIDTH * WIDTH) if i not in kept)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.norm(torch.tanh(self.hidden(self.embed(ids))))
        third = Poison.apply(self.third.weight, self.poisoned)
        return self.head(nn.functional.linear(torch.tanh(self.second(x)), third))  # pyright: ignore


def tiny_mask(model: nn.Module) -> Mask:
    """0.4 of every tensor; one is kept whole and one not at all."""
    draw = torch.Generator().manual_seed(1)
    indices, shapes = {}, {}
    for name, weight in named_weights(model):
        share = {EMPTY: 0.0, FULL: 1.0}.get(name, 0.4)
        order = torch.randperm(weight.numel(), generator=draw)
        indices[name] = order[: round(share * weight.numel())].sort().values.int()
        shapes[name] = tuple(weight.shape)
    return Mask(indices=indices, shapes=shapes, origin=Origin(rule="test", base="", model="tiny"))


def dense(mask: Mask) -> dict[str, torch.Tensor]:
    """The mask as booleans."""
    found = {}
    for name, shape in mask.shapes.items():
        flat = torch.zeros(torch.Size(shape).numel(), dtype=torch.bool)
        flat[mask.indices[name].long()] = True
        found[name] = flat.view(shape)
    return found


def batch_loss(model: nn.Module, step: int) -> torch.Tensor:
    draw = torch.Generator().manual_seed(100 + step)
    ids, targets = torch.randint(0, VOCAB, (2, 12), generator=draw)
    return nn.functional.cross_entropy(model(ids), targets)


def reference(optim: OptimConfig) -> tuple[dict[str, torch.Tensor], list[float]]:
    """Weights and gradient norms of training on the mask, written out plainly and densely."""
    model = Tiny()
    kept = dense(tiny_mask(model))
    weights = dict(named_weights(model))
    start = {name: w.detach().clone() for name, w in weights.items()}
    optimizer = build_optimizer(model, optim)
    norms = []
    for step in range(STEPS):
        for group in optimizer.param_groups:
            group["lr"] = optim.lr
        batch_loss(model, step).backward()
        grads = {name: w.grad for name, w in weights.items() if w.grad is not None}
        for name, grad in grads.items():
            grad[~kept[name]] = 0.0
        norm = float(torch.cat([grad[kept[name]] for name, grad in grads.items()]).norm())
        norms.append(norm)
        for grad in grads.values():
            grad.mul_(min(1.0, optim.max_grad_norm / (norm + 1e-6)))
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            for name, w in weights.items():
                w[~kept[name]] = start[name][~kept[name]]
    return {name: w.detach() for name, w in weights.items()}, norms


def broken_promises(
    masked: Callable[[nn.Module, Mask], ParameterMask], optim: OptimConfig
) -> set[str]:
    """Promises that training under a parameter mask breaks."""
    model = Tiny()
    mask = tiny_mask(model)
    start = {name: w.detach().clone() for name, w in named_weights(model)}
    training = masked(model, mask)
    engine = TorchEngine(
        model,  # pyright: ignore[reportArgumentType]
        build_optimizer(model, optim),
        gradients=training.gradients,
        precision=Precision.fp32,
        max_grad_norm=optim.max_grad_norm,
        device=torch.device("cpu"),
    )
    norms = []
    for step in range(STEPS):
        batch_loss(model, step).backward()
        norms.append(engine.step(optim.lr))
        training.write_back(engine)
    expected, expected_norms = reference(optim)
    kept, broken = dense(mask), set()
    for name, weight in named_weights(model):
        found = weight.detach()
        if not torch.equal(found[~kept[name]], start[name][~kept[name]]):
            broken.add("frozen moved")
        if not torch.allclose(found[kept[name]], expected[name][kept[name]], rtol=1e-5, atol=1e-6):
            broken.add("kept differ")
    if norms != pytest.approx(expected_norms, rel=1e-5):
        broken.add("norm differs")
    return broken


class DecayLeaks(RestoredTraining):
    """Gradients are masked and nothing else: decoupled decay goes on."""

    def write_back(self, engine: TorchEngine) -> None:
        pass


class MomentumLeaks(RestoredTraining):
    """The mask comes after the first step, and the optimizer keeps what it has gathered."""

    def __init__(self, model: nn.Module, mask: Mask) -> None:
        self.steps = 0
        super().__init__(model, mask)
        for each in self._restored:
            each.parameter._backward_hooks.clear()  # pyright: ignore
            each.parameter.register_hook(
                lambda g, e=each: g if not self.steps else e._masked_gradient(g)
            )

    def gradients(self) -> list[torch.Tensor]:
        return [torch.where(g.isfinite(), g, 0.0) for g in super().gradients()]

    def write_back(self, engine: TorchEngine) -> None:
        if not self.steps:
            super().write_back(engine)
        self.steps += 1


class MultiplicationLeaks(RestoredTraining):
    """Gradients times a mask of zeros and ones, and the usual norm of all of them."""

    def __init__(self, model: nn.Module, mask: Mask) -> None:
        super().__init__(model, mask)
        self._everything = DenseTraining(model)
        for each in self._restored:
            each.parameter._backward_hooks.clear()  # pyright: ignore
            each.parameter.register_hook(lambda g, e=each: g * e.kept)

    def gradients(self) -> list[torch.Tensor]:
        return self._everything.gradients()


class NormLeaks(RestoredTraining):
    """The norm counts the gradients of frozen coordinates, finite ones at least."""

    def __init__(self, model: nn.Module, mask: Mask) -> None:
        super().__init__(model, mask)
        self._whole: dict[int, torch.Tensor] = {}
        for each in self._restored:
            each.parameter._backward_hooks.clear()  # pyright: ignore
            each.parameter.register_hook(lambda g, e=each: self._seen(g, e))

    def _seen(self, grad: torch.Tensor, each: Any) -> torch.Tensor:
        self._whole[id(each)] = torch.where(grad.isfinite(), grad, 0.0)
        return each._masked_gradient(grad)

    def gradients(self) -> list[torch.Tensor]:
        return list(self._whole.values())


class TiedEndLeaks(SparseTraining):
    """Only the first end of a tied weight hands its gradient on."""

    def __init__(self, model: Any, mask: Mask) -> None:
        super().__init__(model, mask)
        masked = model.head.parametrizations.weight[0]
        tap, calls = masked.forward, iter(range(10**6))
        masked.forward = lambda values: masked.frozen if next(calls) % 2 else tap(values)


def copied(values: torch.Tensor, masked: MaskedWeight, engine: TorchEngine) -> None:
    """``p.data[mask]`` is a copy, and adding to it changes nothing."""
    flat = masked.frozen.data.view(-1)
    flat[masked.index.long()].add_(values - flat[masked.index.long()])


def in_blocks(values: torch.Tensor, masked: MaskedWeight, engine: TorchEngine) -> None:
    """A kernel that writes whole blocks of 4."""
    flat = masked.frozen.data.view(-1)
    written = values.new_zeros(flat.shape)
    written[masked.index.long()] = values
    for start in {int(i) // 4 * 4 for i in masked.index}:
        flat[start : start + 4] = written[start : start + 4]


def vectors_whole(causal: nn.Module, mask: Mask) -> SparseTraining:
    """1-D tensors take another path: they train whole."""
    return _with_whole(causal, mask, lambda name, shape: len(shape) == 1)


def empty_whole(causal: nn.Module, mask: Mask) -> SparseTraining:
    """An empty mask is taken for no mask."""
    return _with_whole(causal, mask, lambda name, shape: len(mask.indices[name]) == 0)


def _with_whole(
    causal: nn.Module, mask: Mask, whole: Callable[[str, tuple[int, ...]], bool]
) -> SparseTraining:
    indices = {
        name: torch.arange(mask.numel(name), dtype=torch.int32)
        if whole(name, shape)
        else mask.indices[name]
        for name, shape in mask.shapes.items()
    }
    return SparseTraining(causal, replace(mask, indices=indices))


ADAMW = AdamWConfig(lr=LR, weight_decay=0.1, max_grad_norm=CLIP)
SGD = SGDConfig(lr=LR, weight_decay=0.1, max_grad_norm=CLIP, momentum=0.9)
optimizers = pytest.mark.parametrize("optim", [ADAMW, SGD], ids=["adamw", "sgd"])


@optimizers
@pytest.mark.parametrize("masked", [SparseTraining, RestoredTraining])
def test_no_promise_is_broken(masked: Any, optim: OptimConfig) -> None:
    assert broken_promises(masked, optim) == set()


@optimizers
@pytest.mark.parametrize(
    ("planted", "breaks"),
    [
        (DecayLeaks, "frozen moved"),
        (MomentumLeaks, "frozen moved"),
        (MultiplicationLeaks, "norm differs"),
        (NormLeaks, "norm differs"),
        (TiedEndLeaks, "kept differ"),
        (vectors_whole, "frozen moved"),
        (empty_whole, "frozen moved"),
    ],
)
def test_a_planted_leak_is_caught(planted: Any, breaks: str, optim: OptimConfig) -> None:
    assert breaks in broken_promises(planted, optim)


@optimizers
@pytest.mark.parametrize(
    ("write_back", "breaks"), [(copied, "kept differ"), (in_blocks, "frozen moved")]
)
def test_a_leak_in_writing_back_is_caught(
    write_back: Any, breaks: str, optim: OptimConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parameter_mask, "_write_back", write_back)
    assert breaks in broken_promises(SparseTraining, optim)


def test_frozen_coordinates_have_no_gradient_state_or_master() -> None:
    model = Tiny()
    mask = tiny_mask(model)
    SparseTraining(model, mask)
    trained = [p for p in model.parameters() if p.requires_grad]
    assert sum(p.numel() for p in trained) == sum(mask.counts().values())


def test_a_mask_of_another_model_is_refused() -> None:
    mask = tiny_mask(Tiny())
    with pytest.raises(
        ValueError, match=r"does not fit the model: .* in the mask and .* in the model"
    ):
        SparseTraining(nn.Linear(3, 3), mask)
