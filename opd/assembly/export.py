"""The student of a checkpoint as a plain Hugging Face folder, whatever engine and ranks wrote it."""

from pathlib import Path

import torch
from torch import nn

from opd.assembly.model import build_model, read_run_mask
from opd.config.launch import LaunchEngine
from opd.config.schema import Config
from opd.data.tokenizer import read_student_tokenizer
from opd.train.optimizers import named_groups
from opd.train.saved_states import open_states, read_rank_state
from opd.train.torch_engine import WholeWeights
from opd.train.weights import export, full_weights
from opd.world import World


@torch.no_grad()
def export_checkpoint(config: Config, run_folder: Path, checkpoint: Path, out: Path) -> None:
    """Write the weights of ``checkpoint``, adapters merged, as the run would write its final model.

    ``config`` is the run's. The weights are those of the checkpoint's masters in the number format of
    the run. Raises ValueError when the checkpoint is of another mask or of other parameters.
    """
    world = World(rank=0, size=1, local_rank=0, device=torch.device("cpu"))
    tokenizer = read_student_tokenizer(config.student, config.data.chat_template)
    mask = read_run_mask(config, run_folder)
    model, parameter_mask, _ = build_model(config, mask, world, [tokenizer.end_id])
    state = read_rank_state(str(checkpoint), world)
    if state["mask"] != parameter_mask.mask:
        raise ValueError(
            f"the checkpoint {checkpoint} was trained with another mask than the run's"
        )
    student = nn.ModuleDict({"model": model})  # the names that parameters have in a checkpoint
    read = open_states(str(checkpoint), state.get("layout", _layout(config)), named_groups(student))
    for name, parameter in student.named_parameters():
        if parameter.requires_grad:
            parameter.view(-1).copy_(read(name)["master"])
    engine = WholeWeights()
    parameter_mask.write_back(engine)
    weights = full_weights(model, engine.gathered)
    export(weights, model, tokenizer.tokenizer, out, stop_ids=tokenizer.stop_ids)


def _layout(config: Config) -> dict[str, object]:
    """How a checkpoint that does not say it was divided."""
    if config.launch.engine == LaunchEngine.torch:
        return {"engine": "torch"}
    return {"engine": "deepspeed", "zero": config.zero}
