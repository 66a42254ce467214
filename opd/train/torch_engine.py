"""The training engine on plain torch, in one process."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch

from opd.batch import Batch, LossOutput
from opd.config.train import Precision
from opd.interfaces import Loss
from opd.train.optimizers import create_states, named_groups
from opd.train.saved_states import Layout, open_states
from opd.train.student import Student


class TorchEngine:
    """Implements ``TrainingEngine`` in one process without DeepSpeed.

    ``gradients`` returns those that the norm counts. bf16 keeps fp32 weights and computes under autocast.
    """

    def __init__(
        self,
        student: Student,
        optimizer: torch.optim.Optimizer,
        *,
        gradients: Callable[[], list[torch.Tensor]],
        precision: Precision,
        max_grad_norm: float,
        device: torch.device,
    ) -> None:
        self._student = student
        self._optimizer = optimizer
        self._gradients = gradients
        self._autocast = precision == Precision.bf16
        self._max_grad_norm = max_grad_norm
        self._device = device
        create_states(optimizer, (p for g in optimizer.param_groups for p in g["params"]))

    @property
    def layout(self) -> Layout:
        return {"engine": "torch"}

    def forward(self, batch: Batch, loss: Loss | None) -> LossOutput:
        compute = (
            torch.autocast(self._device.type, torch.bfloat16) if self._autocast else nullcontext()
        )
        with compute:
            total, sums, maxima, counts = self._student(batch.to(self._device), loss)
        return LossOutput(total=total, sums=sums, maxima=maxima, counts=counts)

    def backward(self, total: torch.Tensor, *, last: bool) -> None:
        total.backward()

    def step(self, lr: float) -> float:
        for group in self._optimizer.param_groups:
            group["lr"] = lr
        total = torch.nn.utils.get_total_norm(self._gradients())
        norm = float(total)
        if math.isfinite(norm):
            if self._max_grad_norm:
                parameters = self._student.parameters()
                torch.nn.utils.clip_grads_with_norm_(parameters, self._max_grad_norm, total)
            self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        return norm

    @contextmanager
    def gathered(self, parameters: Sequence[torch.nn.Parameter]) -> Iterator[None]:
        yield

    def parts(self, parameter: torch.nn.Parameter) -> list[tuple[torch.Tensor, int]]:
        return [(parameter.data.view(-1), 0)]

    def rewrite(
        self, parameter: torch.nn.Parameter, change: Callable[[torch.Tensor], torch.Tensor]
    ) -> None:
        parameter.data.copy_(change(parameter.data))

    def full_state(self, parameter: torch.nn.Parameter, key: str) -> torch.Tensor:
        return parameter.data if key == "master" else self._optimizer.state[parameter][key]

    def full_states(
        self, parameters: Sequence[torch.nn.Parameter], keys: Sequence[str]
    ) -> list[list[torch.Tensor]]:
        return [[self.full_state(p, k).view(-1) for k in keys] for p in parameters]

    def full_gradient(self, parameter: torch.nn.Parameter) -> torch.Tensor:
        assert parameter.grad is not None
        return parameter.grad

    def save(self, folder: str) -> None:
        trained = {n: p.data for n, p in self._student.named_parameters() if p.requires_grad}
        state = {"student": trained, "optimizer": self._optimizer.state_dict()}
        torch.save(state, Path(folder) / "torch.pt")

    def load(self, folder: str) -> None:
        state = torch.load(Path(folder) / "torch.pt", map_location="cpu", weights_only=True)
        absent, surplus = self._student.load_state_dict(state["student"], strict=False)
        assert not surplus, f"the checkpoint holds {surplus[0]}, which the student does not have"
        trained = {n for n, p in self._student.named_parameters() if p.requires_grad}
        assert not trained & set(absent), f"the checkpoint lacks {sorted(trained & set(absent))[0]}"
        self._optimizer.load_state_dict(state["optimizer"])

    @torch.no_grad()
    def restore(self, folder: str, saved: Layout) -> None:
        read = open_states(folder, saved, named_groups(self._student))
        for name, parameter in self._student.named_parameters():
            if parameter.requires_grad:
                states = dict(read(name))
                parameter.view(-1).copy_(states.pop("master"))
                for key, value in states.items():
                    self._optimizer.state[parameter][key].view(-1).copy_(value)
