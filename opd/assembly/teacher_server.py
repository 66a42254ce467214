"""The back end of a teacher server."""

import torch

from opd.config.teacher import TeacherBackend, TeacherServerConfig
from opd.model_head import read_model_config
from opd.teacher.backend import ServerBackend
from opd.teacher.backend_torch import TorchBackend
from opd.teacher.backend_vllm import VllmBackend


def build_backend(config: TeacherServerConfig) -> ServerBackend:
    """Load the model. ValueError when it cannot be read as a model folder or Hub id."""
    read_model_config(config.model)
    match config.backend:
        case TeacherBackend.vllm:
            return VllmBackend(config.model, config)
        case TeacherBackend.torch:
            device = "cuda" if torch.cuda.is_available() else "cpu"
            return TorchBackend(config.model, config, device=device)
