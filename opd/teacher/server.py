"""The teacher as a process: ``python -m opd.teacher.server --model ...``, or ``opd teacher``."""

import logging
import os
import sys

from fastapi import FastAPI

from opd.serving.server import serve
from opd.teacher.app import teacher_app
from opd.teacher.backend import Backend
from opd.teacher.options import TOKEN_VARIABLE, BackendName, TeacherServerOptions, parse
from opd.teacher.work_queue import WorkQueue


def main(options: TeacherServerOptions) -> None:
    """Load the model, serve until SIGTERM or SIGINT.

    ``ValueError`` when the address is taken, or not loopback and there is no token.
    """
    token = os.environ.get(TOKEN_VARIABLE)

    def loaded() -> FastAPI:
        work = WorkQueue(lambda: _backend(options), group_tokens=options.group_tokens)
        return teacher_app(
            work,
            token=token,
            max_body_bytes=options.max_body_bytes,
            max_answer_bytes=options.max_answer_bytes,
        )

    serve(
        loaded,
        host=options.host,
        port=options.port,
        port_file=options.port_file,
        token=token,
        variable=TOKEN_VARIABLE,
        exit_with_parent=options.exit_with_parent,
    )


def _backend(options: TeacherServerOptions) -> Backend:
    match options.backend:
        case BackendName.vllm:
            from opd.teacher.backend_vllm import VllmBackend

            return VllmBackend(
                options.model,
                dtype=options.dtype,
                max_length=options.max_length,
                batch_tokens=options.batch_tokens,
                tensor_parallel_size=options.tensor_parallel_size,
                gpu_memory_fraction=options.gpu_memory_fraction,
                kv_cache_bytes=options.kv_cache_bytes,
            )
        case BackendName.torch:
            import torch

            from opd.teacher.backend_torch import TorchBackend

            return TorchBackend(
                options.model,
                dtype=options.dtype,
                device="cuda" if torch.cuda.is_available() else "cpu",
                batch_tokens=options.batch_tokens,
                max_length=options.max_length,
            )


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)
    try:
        main(parse())
    except ValueError as error:
        sys.exit(f"opd teacher: {error}")
