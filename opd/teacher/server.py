"""The teacher as a process: ``python -m opd.teacher.server --model ...``, or ``opd teacher``."""

import ipaddress
import logging
import os
import signal
import socket
import sys
import threading
import time
from pathlib import Path

import uvicorn

from opd.teacher.app import teacher_app
from opd.teacher.backend import Backend
from opd.teacher.options import TOKEN_VARIABLE, BackendName, TeacherServerOptions, parse
from opd.teacher.work import WorkQueue

PARENT_POLL_S = 0.5
MOST_CONNECTIONS = 256  # further ones get 503, which the client tries again
GRACE_S = 5  # for answers under way when asked to end

log = logging.getLogger("opd.teacher")


def main(options: TeacherServerOptions) -> None:
    """Load the model, serve until SIGTERM or SIGINT.

    ``ValueError`` when the address is taken, or not loopback and there is no token.
    """
    if options.exit_with_parent:
        threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
    token = os.environ.get(TOKEN_VARIABLE)
    _require_token_beyond_loopback(options.host, token)
    with _bound(options.host, options.port) as listener:
        work = WorkQueue(lambda: _backend(options), group_tokens=options.group_tokens)
        app = teacher_app(
            work,
            token=token,
            max_body_bytes=options.max_body_bytes,
            max_answer_bytes=options.max_answer_bytes,
        )
        config = uvicorn.Config(
            app,
            log_config=None,
            log_level="warning",
            access_log=False,
            limit_concurrency=MOST_CONNECTIONS,
            timeout_graceful_shutdown=GRACE_S,
        )
        listener.listen(MOST_CONNECTIONS)  # from here on a connection waits instead of failing
        port = listener.getsockname()[1]
        if options.port_file is not None:
            _write_whole(Path(options.port_file), str(port))
        log.info("teacher %s ready on http://%s:%d", options.model, options.host, port)
        uvicorn.Server(config).run(sockets=[listener])


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


def _require_token_beyond_loopback(host: str, token: str | None) -> None:
    loopback = host == "localhost" or _is_loopback(host)
    if not (loopback or token):
        raise ValueError(
            f"host {host} can be reached from other machines and no token is set; "
            f"set {TOKEN_VARIABLE} to a random secret here and where the trainer runs"
        )


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _bound(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except OSError as error:
        listener.close()
        raise ValueError(f"cannot bind {host}:{port}: {error}; choose another port") from error
    return listener


def _write_whole(path: Path, text: str) -> None:
    """Readers see nothing or all of it."""
    partial = path.with_name(f"{path.name}.{os.getpid()}")
    partial.write_text(text)
    partial.replace(path)


def _end_with(parent: int) -> None:
    """End this process once ``parent`` is gone: an orphan would hold its GPUs for ever."""
    while os.getppid() == parent:
        time.sleep(PARENT_POLL_S)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(2 * GRACE_S)
    os._exit(1)


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)
    try:
        main(parse())
    except ValueError as error:
        sys.exit(f"opd teacher: {error}")
