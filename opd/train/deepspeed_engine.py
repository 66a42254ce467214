"""The training engine on DeepSpeed, through accelerate.

The loss is already divided by the global token count, so gradients must be summed over micro-batches
and ranks. DeepSpeed averages over ranks: the loss is multiplied by their number, once, in
``DeepSpeedEngine.backward``. DeepSpeed would also divide by accumulation steps: these are set to 1,
and the accumulation boundary is set by hand.
"""

import json
import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import torch

from opd.batch import Batch, LossOutput
from opd.interfaces import Loss
from opd.train.optimizers import create_states, named_groups
from opd.train.saved_states import Layout, allowed_classes, open_states
from opd.train.student import Student
from opd.world import World


class DeepSpeedEngine:
    """Implements ``TrainingEngine`` with ZeRO stages 0 to 3, on any number of ranks.

    ``config`` is a DeepSpeed config (see ``merged_deepspeed``); ``zero_optimization.stage`` is set.
    """

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
        self._steps_on_any_gradient = self._zero == 0 and "bf16" not in config
        backend = "nccl" if world.device.type == "cuda" else "gloo"
        accelerator = Accelerator(
            deepspeed_plugin=DeepSpeedPlugin(hf_ds_config=config),
            kwargs_handlers=[InitProcessGroupKwargs(backend=backend)],
        )
        self._engine, wrapped = accelerator.prepare(student, optimizer)
        if self._zero == 0 and "bf16" in config:
            # DeepSpeed's set-up takes a step on zero gradients, which leaves Adam's counter at 1
            optimizer.state.clear()
        self._optimizer = wrapped.optimizer
        self._create_states()
        self._linked = False
        self._layout = {
            "engine": "deepspeed",
            "ranks": world.size,
            "zero": self._zero,
            "zero_optimization": json.dumps(config["zero_optimization"], sort_keys=True),
        }

    @property
    def layout(self) -> Layout:
        return self._layout

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
        if self._steps_on_any_gradient and not math.isfinite(plain_norm):
            self._engine.zero_grad()
            return plain_norm
        self._engine.step()
        if not self._engine.was_step_applied():  # DeepSpeed then keeps the norm of an earlier step
            return math.nan
        norm = self._engine.get_global_grad_norm()
        return plain_norm if norm is None else float(norm)

    def _plain_grad_norm(self) -> float:
        """The norm where DeepSpeed reports none: stage 0 in fp32, which leaves gradients in place."""
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
        from deepspeed.utils import safe_get_full_fp32_param

        if self._zero:
            master: Any = safe_get_full_fp32_param(parameter)
            self._set_state(parameter, "master", change(master).view(-1))
        with self.gathered([parameter]):
            changed = change(parameter.data).view(-1)
            for part, start in self.parts(parameter):
                part.copy_(changed[start : start + len(part)])

    def full_state(self, parameter: torch.nn.Parameter, key: str) -> torch.Tensor:
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        assert self._zero, "stage 0 gives no access to optimizer states"
        if key != "master":
            self._link_states()
        state: Any = (
            safe_get_full_fp32_param(parameter)
            if key == "master"
            else safe_get_full_optimizer_state(parameter, key)
        )
        assert state is not None, f"the optimizer has no state {key}"
        return state

    def full_states(
        self, parameters: Sequence[torch.nn.Parameter], keys: Sequence[str]
    ) -> list[list[torch.Tensor]]:
        if self._zero == 3 or not parameters or not keys:
            return [[self.full_state(p, k).reshape(-1) for k in keys] for p in parameters]
        assert self._zero, "stage 0 gives no access to optimizer states"
        if any(key != "master" for key in keys):
            self._link_states()
        sizes = [p.numel() for p in parameters for _ in keys]
        gathered = torch.zeros(sum(sizes), device=self._world.device)
        parts = iter(gathered.split(sizes))
        states = [[next(parts) for _ in keys] for _ in parameters]
        for parameter, targets in zip(parameters, states, strict=True):
            mapping: Any = parameter._hp_mapping  # pyright: ignore[reportAttributeAccessIssue]
            if mapping is None:
                continue  # all of it is on another rank
            own = mapping.lp_fragment_address
            for key, target in zip(keys, targets, strict=True):
                fragment = mapping.get_hp_fragment(None if key == "master" else key)
                target[own.start : own.start + own.numel].copy_(fragment)
        self._world.add_up(gathered)
        return states

    def _create_states(self) -> None:
        """Create the states of this rank's masters, except those that DeepSpeed swaps to disk."""
        basic = self._engine.basic_optimizer
        if self._zero < 3:
            # flat masters of this rank in stages 1 and 2, parameters or their masters in stage 0
            create_states(basic, [p for g in basic.param_groups for p in g["params"]])
            return
        sharded = self._engine.optimizer
        if sharded.swap_optimizer:
            return
        for number, master in enumerate(sharded.fp32_partitioned_groups_flat):
            on_gpu = sharded.offload_optimizer and sharded.subgroup_to_device[number] != "cpu"
            create_states(sharded.backup_optimizer if on_gpu else basic, [master])

    def _link_states(self) -> None:
        """Give every parameter access to its optimizer states, once these exist.

        Stages 1 and 2 do so in the first step after the first parameter group only, so that vectors
        have no states, and after a load not at all.
        """
        if not self._linked and self._zero < 3:
            optimizer = self._engine.optimizer
            optimizer._hp_optimizer_states_linked = False
            optimizer._lazy_init_hp_params_optimizer_state()
        self._linked = True

    def full_gradient(self, parameter: torch.nn.Parameter) -> torch.Tensor:
        from deepspeed.utils import safe_get_full_grad

        assert self._zero, "stage 0 averages gradients inside the step"
        gradient: Any = safe_get_full_grad(parameter)
        return gradient

    def save(self, folder: str) -> None:
        self._engine.save_checkpoint(folder, tag="deepspeed", exclude_frozen_parameters=True)

    def load(self, folder: str) -> None:
        with _weights_only():
            path, _ = self._engine.load_checkpoint(
                folder, tag="deepspeed", load_module_strict=False
            )
        assert path is not None, f"DeepSpeed found no checkpoint in {folder}"
        self._linked = False

    @torch.no_grad()
    def restore(self, folder: str, saved: Layout) -> None:
        if any("nvme" in str(layout.get("zero_optimization")) for layout in (saved, self._layout)):
            raise ValueError(
                f"states on NVMe are not in the checkpoint {folder}: resume with the launch.deepspeed, "
                "launch.processes and zero of the run, or use another run.dir"
            )
        read = open_states(folder, saved, named_groups(self._engine.module))
        if self._zero in (1, 2):
            self._link_states()
        step = 0.0
        for name, parameter in self._engine.module.named_parameters():
            if not parameter.requires_grad:
                continue
            states = dict(read(name))
            step = max(step, float(states.pop("step", torch.zeros(1))))
            for key, value in states.items():
                self._set_state(parameter, key, value)
            for part, start in self.parts(parameter):
                part.copy_(states["master"][start : start + len(part)])
        for state in self._engine.basic_optimizer.state.values():
            if "step" in state:
                state["step"].fill_(step)

    def _set_state(self, parameter: Any, key: str, value: torch.Tensor) -> None:
        """Set this rank's part of a master or an optimizer state to that of the whole, flat ``value``."""
        state_key = None if key == "master" else key
        if self._zero == 0:
            master = self._masters.get(id(parameter), parameter)
            basic: Any = self._engine.basic_optimizer
            states = basic.state[master]
            whole: Any = master if state_key is None else states[state_key]
            whole.view(-1).copy_(value)
        elif self._zero < 3:
            mapping = parameter._hp_mapping
            if mapping is not None:  # else all of it is on another rank
                own = mapping.lp_fragment_address
                part = mapping.get_hp_fragment(state_key)
                part.copy_(value[own.start : own.start + own.numel])
        else:
            optimizer: Any = self._engine.optimizer
            part, _ = optimizer._get_fp32_opt_state_partition(parameter, False, state_key)
            start = self._world.rank * len(part)
            unpadded = value[start : start + len(part)]  # the last part is padded
            part[: len(unpadded)].copy_(unpadded)

    @cached_property
    def _masters(self) -> dict[int, torch.Tensor]:
        """id of a parameter -> its float32 master, where stage 0 has masters."""
        if self._steps_on_any_gradient:
            return {}
        optimizer = self._engine.optimizer
        pairs = zip(optimizer.fp16_groups, optimizer.fp32_groups, strict=True)
        return {
            id(p): master for ps, masters in pairs for p, master in zip(ps, masters, strict=True)
        }


@contextmanager
def _weights_only() -> Iterator[None]:
    """Inside, DeepSpeed's checkpoint files may hold only tensors and a few plain classes of its own.

    DeepSpeed would unpickle anything.
    """
    before = os.environ.get("TORCH_FORCE_WEIGHTS_ONLY_LOAD")
    os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = "1"
    try:
        with allowed_classes():
            yield
    finally:
        if before is None:
            del os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"]
        else:
            os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = before
