"""``launch``: settings that depend on the machine; the DeepSpeed configuration of a run."""

from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any

from opd.checked_json import read_json
from opd.config.fields import bounded
from opd.config.train import Precision

if TYPE_CHECKING:
    from opd.config.schema import Config


class LaunchEngine(StrEnum):
    deepspeed = "deepspeed"
    torch = "torch"


@dataclass(kw_only=True, slots=True)
class DeadlineConfig:
    """Seconds in which a rank must finish something in a phase, or else it hangs; 0: no deadline."""

    start: float = bounded(3600.0, least=0)
    """From the start of the process to the first phase of the run: imports, models, first comparisons."""
    rollout: float = bounded(1800.0, least=0)
    """Between two steps of an engine in the process, or for the whole response of a server."""
    teacher: float = bounded(1800.0, least=0)
    """Between two responses of the teacher."""
    learn: float = bounded(1200.0, least=0)
    """Between two micro-batches, and for the optimizer step."""
    sync: float = bounded(1200.0, least=0)
    """Weights into the engine."""
    evaluate: float = bounded(1800.0, least=0)
    """As for rollout and teacher."""
    checkpoint: float = bounded(1800.0, least=0)
    """Writing a checkpoint, or the final model."""
    server: float = bounded(60.0, least=0)
    """For a sign of life of a server that the run started."""


@dataclass(kw_only=True, slots=True)
class LaunchConfig:
    """Settings that depend on the machine."""

    processes: int | str = bounded("auto", least=1, word="auto")
    """Training processes; auto: one on each GPU that teacher.devices and rollout.devices leave."""
    cpu_processes: int = bounded(1, least=1)
    """Training processes of launch.processes=auto on a machine without GPU."""
    engine: LaunchEngine = LaunchEngine.deepspeed
    """deepspeed, or torch: one process without DeepSpeed."""
    deepspeed: str | None = None
    """A DeepSpeed JSON file with stage, offload and bucket sizes, as in launch/deepspeed/."""
    memory_check: bool = True
    """Refuse a run that does not fit the GPUs by the forecast of `opd plan`."""
    threads: int | None = bounded(None, least=1)
    """CPU threads of each process; by default the cores divided evenly among the processes."""
    restarts: int = bounded(0, least=0)
    """How often a run goes on from its last checkpoint by itself after a process was lost or hung."""
    deadlines: DeadlineConfig = field(default_factory=DeadlineConfig)


def count_processes(config: "Config") -> int:
    """``launch.processes`` of a config in which it is a number: a run resolves auto when it starts."""
    processes = config.launch.processes
    assert isinstance(processes, int), "launch.processes=auto has not been resolved"
    return processes


def torch_engine_is_one_process(config: "Config") -> str | None:
    """Only DeepSpeed communicates between processes."""
    processes = config.launch.processes
    if config.launch.engine == LaunchEngine.torch and isinstance(processes, int) and processes > 1:
        return (
            f"launch.engine=torch runs one process, found launch.processes={processes}: "
            "use launch.engine=deepspeed"
        )
    return None


def every_process_gets_a_prompt(config: "Config") -> str | None:
    """Every process needs a prompt in each step."""
    processes = config.launch.processes
    if isinstance(processes, int) and config.train.prompts_per_step < processes:
        return (
            f"train.prompts_per_step={config.train.prompts_per_step} is fewer than "
            f"launch.processes={processes}: give every process a prompt"
        )
    return None


def pure_bf16_has_a_stage(config: "Config") -> str | None:
    """DeepSpeed keeps bf16 states in stages 1 to 3 only."""
    if (
        config.train.precision == Precision.pure_bf16
        and config.launch.engine == LaunchEngine.deepspeed
        and config.zero == 0
    ):
        return "train.precision=pure_bf16 needs zero=1, 2 or 3, found zero=0"
    return None


RULES = (torch_engine_is_one_process, every_process_gets_a_prompt, pure_bf16_has_a_stage)

NUMERICS = {
    "train_batch_size": "train.prompts_per_step",
    "train_micro_batch_size_per_gpu": "train.max_tokens_per_micro_batch",
    "gradient_accumulation_steps": "train.max_tokens_per_micro_batch",
    "gradient_clipping": "optim.max_grad_norm",
    "bf16": "train.precision",
    "fp16": "train.precision",
    "data_types": "train.precision",
    "torch_autocast": "train.precision",
    "optimizer": "optim",
    "scheduler": "optim.schedule",
}
"""Keys of a DeepSpeed file that belong to the recipe, and the setting that holds each."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Offload:
    """Where a stage of ZeRO keeps what it offloads."""

    device: str = "none"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Zero:
    """What opd itself reads of zero_optimization."""

    stage: int | None = None
    offload_optimizer: _Offload | None = None
    offload_param: _Offload | None = None
    reduce_bucket_size: int | float | None = None
    overlap_comm: bool | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class _LaunchFile:
    """What opd itself reads of a DeepSpeed file."""

    zero_optimization: _Zero = field(default_factory=_Zero)


def read_launch_file(name: str) -> dict[str, Any]:
    """The DeepSpeed configuration in a file; ValueError when it cannot be read."""
    try:
        content = Path(name).read_bytes()
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise ValueError(
            f"launch.deepspeed={name} cannot be read ({reason}): give a DeepSpeed JSON file"
        ) from None
    source, remedy = f"launch.deepspeed={name}", "give a DeepSpeed configuration"
    read_json(content, _LaunchFile, source, remedy)
    return read_json(content, dict[str, Any], source, remedy)


def run_deepspeed(config: "Config") -> dict[str, Any]:
    """The DeepSpeed config of a run."""
    return merged_deepspeed(
        config.launch.deepspeed,
        zero=config.zero,
        precision=config.train.precision,
        max_grad_norm=config.optim.max_grad_norm,
    )


def merged_deepspeed(
    launch_file: str | None, *, zero: int, precision: Precision, max_grad_norm: float
) -> dict[str, Any]:
    """A DeepSpeed config: numerics from the recipe, stage, offload and buckets from the launch file.

    Raises ValueError when the file cannot be read, or sets something that the recipe owns.
    """
    machine = read_launch_file(launch_file) if launch_file else {}
    for key, setting in NUMERICS.items():
        if key in machine:
            raise ValueError(
                f"{launch_file} sets {key}, which belongs to the recipe: remove it and set {setting}"
            )
    config: dict[str, Any] = {
        "steps_per_print": 10**9,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        **machine,
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": max_grad_norm,
        "zero_optimization": {**machine.get("zero_optimization", {}), "stage": zero},
    }
    match precision:
        case Precision.fp32:
            pass
        case Precision.bf16:
            config["bf16"] = {"enabled": True}
            # stage 0 has no float32 accumulation beside bf16 gradients
            config["data_types"] = {"grad_accum_dtype": "fp32" if zero else "bf16"}
        case Precision.pure_bf16:
            config["bf16"] = {
                "enabled": True,
                "bf16_master_weights_and_grads": True,
                "bf16_optimizer_states": True,
            }
    return config
