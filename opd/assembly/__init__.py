"""Config -> objects: the only place that chooses a class."""

from opd.assembly.rollout_server import build_host
from opd.assembly.learner import RUN_MASK, build_learner, read_run_mask
from opd.assembly.loss import build_loss, reckoning_of, sampling_of, wanted_of, wants_sequence_gaps
from opd.assembly.numbers import compute_dtype, torch_dtype
from opd.assembly.pool import TEACHER_URLS, pool_models, pool_teachers, urls_of
from opd.assembly.scorers import Live, Teachers, build_reward, build_scorers
from opd.assembly.teacher import (
    TEACHER_URL,
    build_teacher,
    server_client,
    teacher_infos,
    teacher_options,
    transport_words,
)
from opd.assembly.text import Prompts, Text, build_prompts, build_stream, build_text
from opd.assembly.watchers import (
    DEFAULT_GAP,
    VERIFY_PROMPTS,
    build_console,
    build_evaluator,
    build_sync_check,
    build_trackers,
    build_weight_file,
)
from opd.assembly.rollout import (
    ROLLOUT_URLS,
    build_engine,
    build_hand_over,
    build_writer,
    engine_dtype,
    in_process,
    require_rollout_servers,
    rollout_options,
)

__all__ = [
    "DEFAULT_GAP",
    "ROLLOUT_URLS",
    "RUN_MASK",
    "TEACHER_URL",
    "TEACHER_URLS",
    "VERIFY_PROMPTS",
    "Live",
    "Prompts",
    "Teachers",
    "Text",
    "build_console",
    "build_engine",
    "build_evaluator",
    "build_hand_over",
    "build_host",
    "build_learner",
    "build_loss",
    "build_prompts",
    "build_reward",
    "build_scorers",
    "build_stream",
    "build_sync_check",
    "build_teacher",
    "build_text",
    "build_trackers",
    "build_weight_file",
    "build_writer",
    "compute_dtype",
    "engine_dtype",
    "in_process",
    "pool_models",
    "pool_teachers",
    "read_run_mask",
    "reckoning_of",
    "require_rollout_servers",
    "rollout_options",
    "sampling_of",
    "server_client",
    "teacher_infos",
    "teacher_options",
    "torch_dtype",
    "transport_words",
    "urls_of",
    "wanted_of",
    "wants_sequence_gaps",
]
