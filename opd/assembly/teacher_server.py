"""The back end of a teacher server."""

import torch
from transformers import AutoConfig

from opd.config.teacher import TeacherBackend, TeacherServerConfig
from opd.teacher.backend import ServerBackend
from opd.teacher.backend_torch import TorchBackend
from opd.teacher.backend_vllm import VllmBackend


def build_backend(config: TeacherServerConfig) -> ServerBackend:
    """Load the model. ValueError when it cannot be read as a model folder or Hub id."""
    try:
        AutoConfig.from_pretrained(config.model)
    except OSError as error:
        first = str(error).strip().splitlines()[0]
        raise ValueError(
            f"model={config.model} cannot be read as a model folder or Hub id ({first})"
        ) from None
    match config.backend:
        case TeacherBackend.vllm:
            return VllmBackend(config.model, config)
        case TeacherBackend.torch:
            device = "cuda" if torch.cuda.is_available() else "cpu"
            return TorchBackend(config.model, config, device=device)
