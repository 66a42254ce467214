"""The space on the disk that a run's checkpoints and final model need, before it starts."""

import math
from pathlib import Path

from opd.checkpoint.full_disk import free_bytes, readable
from opd.config.launch import count_processes
from opd.config.record import WeightRecordConfig
from opd.config.save import best_metric
from opd.config.schema import Config
from opd.config.teacher import SelfTeacher, SelfTeacherConfig
from opd.config.train import Precision, last_step
from opd.run.forecast.setup import TrainingSetup, mask_densities, read_learner
from opd.run.model_facts import ModelFacts, read_facts


def check_space(config: Config, folder: Path, start: int) -> str | None:
    """What the run will write from step ``start`` on, in words; None where the model's size is unknown.

    Raises ValueError when that does not fit, unless save.disk_check=false.
    """
    try:
        trusted = config.student.trust_remote_code
        facts = read_facts(config.student.model, trust_remote_code=trusted)
    except (ValueError, LookupError, AttributeError, TypeError):
        return None  # a family of other layers than `opd plan` knows; unreadable ones are reported elsewhere
    each, model = checkpoint_bytes(config, facts), final_bytes(config, facts)
    count = written_at_once(config, start)
    held = sum(p.stat().st_size for p in folder.glob("checkpoints/**/*") if p.is_file())
    needed, free = count * each + model - held, free_bytes(folder)
    words = f"{count} checkpoint(s) of {readable(each)} and a model of {readable(model)}"
    if config.save.disk_check and needed > free:
        raise ValueError(
            f"the run writes {words} into {folder}, where {readable(free)} are free: free some space, lower "
            "save.keep, give another run.dir, or start it all the same with save.disk_check=false"
        )
    return f"{words}; {readable(free)} are free"


def written_at_once(config: Config, start: int) -> int:
    """The most checkpoints on the disk at a time: those that are kept, and the one that is written."""
    steps = max(0, last_step(config) - start)
    saves = math.ceil(steps / config.save.every) if config.save.every else min(steps, 1)
    kept = config.save.keep + 1 + (best_metric(config) is not None)
    return min(saves, kept)


def checkpoint_bytes(config: Config, facts: ModelFacts) -> int:
    """e T weights (none under ZeRO-3), m T masters (where there are any), m T for each optimizer state.

    T trained numbers, e bytes of a weight, m of a master. A moving average adds 4 P, record=weights P / 8.
    """
    setup = _setup(config, facts)
    masters = setup.zero is not None and (setup.zero > 0 or setup.precision != Precision.fp32)
    number = setup.states * (setup.master if setup.zero is not None else setup.element)
    number += (setup.zero != 3) * setup.element + masters * setup.master
    more = 0
    if isinstance(config.teacher, SelfTeacherConfig) and config.teacher.weights == SelfTeacher.ema:
        more += 4 * facts.parameters
    if isinstance(config.record, WeightRecordConfig):
        more += facts.parameters // 8
    return setup.trained * number + more


def final_bytes(config: Config, facts: ModelFacts) -> int:
    """e P of the final model."""
    return _setup(config, facts).element * facts.parameters


def _setup(config: Config, facts: ModelFacts) -> TrainingSetup:
    density = list(mask_densities(config).values())[-1]
    ranks = count_processes(config)
    return read_learner(config, facts, ranks=ranks, cuda=False, prompt_tokens=1, density=density)
