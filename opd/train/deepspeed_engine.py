"""DeepSpeed through accelerate drives forward, backward and step.

It takes gradients of a loss that is already divided by the global token count, so that the
parameters see the sum over micro-batches and ranks. DeepSpeed averages over ranks: the loss is
multiplied by their number, once, in ``DeepSpeedEngine.backward``. It would divide by accumulation
steps: accumulation steps are set to 1 and the boundary is set by hand.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from opd.batch import Batch, LossOutput
from opd.interfaces import Loss
from opd.train.student import Student
from opd.world import World


class DeepSpeedEngine:
    """ZeRO 0-3 on any number of ranks."""

    def __init__(
        self,
        student: Student,
        optimizer: torch.optim.Optimizer,
        *,
        config: dict[str, Any],
        world: World,
    ) -> None:
        from accelerate import Accelerator
        from accelerate.utils import DeepSpeedPlugin, InitProcessGroupKwargs

        self._world = world
        self._zero: int = config["zero_optimization"]["stage"]
        backend = "nccl" if world.device.type == "cuda" else "gloo"
        accelerator = Accelerator(
            deepspeed_plugin=DeepSpeedPlugin(hf_ds_config=config),
            kwargs_handlers=[InitProcessGroupKwargs(backend=backend)],
        )
        self._engine, wrapped = accelerator.prepare(student, optimizer)
        if self._zero == 0 and "bf16" in config:
            # its set-up takes a step on zero gradients, which leaves Adam's counter at 1
            optimizer.state.clear()
        self._optimizer = wrapped.optimizer
        self._linked = False

    def forward(self, batch: Batch, loss: Loss | None) -> LossOutput:
        total, sums, maxima, counts = self._engine(batch.to(self._world.device), loss)
        return LossOutput(total=total, sums=sums, maxima=maxima, counts=counts)

    def backward(self, total: torch.Tensor, *, last: bool) -> None:
        self._engine.set_gradient_accumulation_boundary(last)
        self._engine.backward(total * self._world.size)

    def step(self, lr: float) -> float:
        for group in self._optimizer.param_groups:
            group["lr"] = lr
        plain_norm = self._plain_grad_norm()
        self._engine.step()
        norm = self._engine.get_global_grad_norm()
        return plain_norm if norm is None else float(norm)

    def _plain_grad_norm(self) -> float:
        """Stage 0 in fp32 leaves gradients in place and reports no norm of its own."""
        grads = [p.grad for p in self._engine.module.parameters() if p.grad is not None]
        return float(torch.nn.utils.get_total_norm(grads)) if grads else float("nan")

    @contextmanager
    def gathered(self, parameters: Sequence[torch.nn.Parameter]) -> Iterator[None]:
        if self._zero < 3:
            yield
            return
        from deepspeed import zero

        with zero.GatheredParameters(list(parameters)):
            yield

    def parts(self, parameter: torch.nn.Parameter) -> list[tuple[torch.Tensor, int]]:
        if self._zero < 3:
            return [(parameter.data.view(-1), 0)]
        sharded: Any = parameter
        shard = sharded.ds_tensor.data
        start = self._world.rank * len(shard)
        own = shard[: max(0, sharded.ds_numel - start)]  # the last shard is padded
        # small parameters stay gathered, beside their shards
        whole = [(parameter.data.view(-1), 0)] if parameter.numel() else []
        return [(own, start), *whole]

    def rewrite(
        self, parameter: torch.nn.Parameter, change: Callable[[torch.Tensor], torch.Tensor]
    ) -> None:
        from deepspeed.utils import safe_get_full_fp32_param, safe_set_full_fp32_param

        if self._zero:
            master: Any = safe_get_full_fp32_param(parameter)
            safe_set_full_fp32_param(parameter, change(master))
        with self.gathered([parameter]):
            changed = change(parameter.data).view(-1)
            for part, start in self.parts(parameter):
                part.copy_(changed[start : start + len(part)])

    def full_state(self, parameter: torch.nn.Parameter, key: str) -> torch.Tensor:
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        assert self._zero, "stage 0 does not say what its optimizer holds"
        if key != "master":
            self._link_states()
        found: Any = (
            safe_get_full_fp32_param(parameter)
            if key == "master"
            else safe_get_full_optimizer_state(parameter, key)
        )
        assert found is not None, f"the optimizer holds no {key}"
        return found

    def full_states(
        self, parameters: Sequence[torch.nn.Parameter], keys: Sequence[str]
    ) -> list[list[torch.Tensor]]:
        if self._zero == 3 or not parameters or not keys:
            return [[self.full_state(p, k).reshape(-1) for k in keys] for p in parameters]
        assert self._zero, "stage 0 does not say what its optimizer holds"
        if any(key != "master" for key in keys):
            self._link_states()
        sizes = [p.numel() for p in parameters for _ in keys]
        gathered = torch.zeros(sum(sizes), device=self._world.device)
        parts = iter(gathered.split(sizes))
        states = [[next(parts) for _ in keys] for _ in parameters]
        for parameter, found in zip(parameters, states, strict=True):
            mapping: Any = parameter._hp_mapping  # pyright: ignore[reportAttributeAccessIssue]
            if mapping is None:
                continue  # another rank holds all of it
            own = mapping.lp_fragment_address
            for key, part in zip(keys, found, strict=True):
                held = mapping.get_hp_fragment(None if key == "master" else key)
                part[own.start : own.start + own.numel].copy_(held)
        self._world.add_up(gathered)
        return states

    def _link_states(self) -> None:
        """Stages 1 and 2 tie parameters to their states within the first step, after its first group,
        so that vectors have none, and not at all after a load: tie them all, once they are there."""
        if not self._linked and self._zero < 3:
            optimizer = self._engine.optimizer
            optimizer._hp_optimizer_states_linked = False
            optimizer._lazy_init_hp_params_optimizer_state()
        self._linked = True

    def full_gradient(self, parameter: torch.nn.Parameter) -> torch.Tensor:
        from deepspeed.utils import safe_get_full_grad

        assert self._zero, "stage 0 averages gradients inside the step"
        found: Any = safe_get_full_grad(parameter)
        return found

    def save(self, folder: str) -> None:
        self._engine.save_checkpoint(folder, tag="deepspeed", exclude_frozen_parameters=True)

    def load(self, folder: str) -> None:
        with _weights_only():
            path, _ = self._engine.load_checkpoint(
                folder, tag="deepspeed", load_module_strict=False
            )
        assert path is not None, f"DeepSpeed found no checkpoint in {folder}"
        self._linked = False


@contextmanager
def _weights_only() -> Iterator[None]:
    """DeepSpeed unpickles its files freely; inside, only tensors and plain classes of its own load."""
    from deepspeed.runtime.fp16.loss_scaler import LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    before = os.environ.get("TORCH_FORCE_WEIGHTS_ONLY_LOAD")
    os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = "1"
    try:
        with torch.serialization.safe_globals([LossScaler, ZeroStageEnum, fragment_address]):
            yield
    finally:
        if before is None:
            del os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"]
        else:
            os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = before
