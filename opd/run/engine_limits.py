"""What vLLM cannot run on CPUs, noticed before an engine is started."""

from collections.abc import Iterator

from transformers import AutoConfig

from opd.config.rollout import VllmRolloutConfig
from opd.config.schema import Config
from opd.config.teacher import ServedTeacherConfig, TeacherBackend
from opd.teacher.connect import started_models

CPU_HEAD_SIZES = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512)
"""Of vLLM 0.32, CPUAttentionBackend.get_supported_head_sizes."""


def require_engines_run(config: Config) -> None:
    """ValueError for a model whose attention heads vLLM has no kernel for on CPUs.

    What cannot be read, and what has no such heads, is left to other checks.
    """
    for setting, model, remedy in _models(config):
        size = _head_size(model, trust_remote_code=config.student.trust_remote_code)
        if size is not None and size not in CPU_HEAD_SIZES:
            raise ValueError(
                f"{setting}={model} has attention heads of {size}, and vLLM on CPUs runs "
                f"{', '.join(map(str, CPU_HEAD_SIZES))}: use {remedy}"
            )


def _head_size(model: str, *, trust_remote_code: bool) -> int | None:
    try:
        config = AutoConfig.from_pretrained(model, trust_remote_code=trust_remote_code)
    except (OSError, ValueError):
        return None
    text = config.get_text_config()
    width, heads = getattr(text, "hidden_size", None), getattr(text, "num_attention_heads", None)
    own = getattr(text, "head_dim", None)
    return own or (width // heads if width and heads else None)


def _models(config: Config) -> Iterator[tuple[str, str, str]]:
    """(setting, model, remedy) of the models that vLLM engines of this run load."""
    if isinstance(config.rollout, VllmRolloutConfig):
        yield "student.model", config.student.model, "rollout=transformers"
    teacher = config.teacher
    if isinstance(teacher, ServedTeacherConfig) and teacher.backend == TeacherBackend.vllm:
        for model in started_models(teacher):
            yield "teacher.model", model, "teacher=local"
