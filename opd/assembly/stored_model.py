"""The model of a checkpoint of a run, in one process, whatever engine and ranks wrote the checkpoint."""

from pathlib import Path

import torch

from opd.assembly.model import build_model, read_run_mask
from opd.config.schema import Config
from opd.data.tokenizer import read_student_tokenizer
from opd.model_head import head_spec
from opd.train.optimizers import named_groups
from opd.train.saved_states import FIRST_RANK, RANK_FILE, open_states
from opd.train.student import Student, causal_lm
from opd.train.torch_engine import TorchEngine
from opd.train.weights import export, full_weights
from opd.world import join_world


@torch.no_grad()
def export_checkpoint(config: Config, run_folder: Path, checkpoint: Path, out: Path) -> None:
    """Write the model of ``checkpoint`` as a Hugging Face folder, bit for bit what ``final/`` would be.

    ``config``: the run's. Raises ValueError for a checkpoint of an older version, or with
    the states of other parameters.
    """
    world = join_world()
    tokenizer = read_student_tokenizer(config.student, config.data.chat_template)
    probe = [tokenizer.stop_ids[0]] * 4
    mask = read_run_mask(config, run_folder)
    model, parameter_mask, _ = build_model(config, mask, world, probe)
    trust = config.student.trust_remote_code
    spec = head_spec(causal_lm(model).config, tokenizer.vocab_size, trust_remote_code=trust)
    head = causal_lm(model).get_output_embeddings().weight
    student = Student(model, spec=spec, temperature=1.0, chunk_bytes=1, teacher_head=lambda _: head)
    engine = TorchEngine(
        student,
        torch.optim.SGD(student.parameters(), lr=0.0),
        gradients=parameter_mask.gradients,
        precision=config.train.precision,
        max_grad_norm=0.0,
        device=world.device,
    )
    saved = torch.load(
        checkpoint / RANK_FILE.format(FIRST_RANK), map_location="cpu", weights_only=True
    )
    if "layout" not in saved:
        raise ValueError(
            f"{checkpoint} was written by an older version, which did not say how states are divided: "
            "resume the run, and its next checkpoint can be read"
        )
    read = open_states(str(checkpoint), saved["layout"], named_groups(student))
    for name, parameter in student.named_parameters():
        if parameter.requires_grad:
            parameter.view(-1).copy_(read(name)["master"])
    parameter_mask.write_back(engine)
    weights = full_weights(model, engine.gathered)
    export(weights, model, tokenizer.tokenizer, out, stop_ids=tokenizer.stop_ids)
