"""Serve an application in a process of its own: address, token, end of the process."""

import logging
import os
import signal
import socket
import time
from collections.abc import Callable
from pathlib import Path

import uvicorn
from fastapi import FastAPI
from starlette.types import ASGIApp

from opd.config.serving import ServingConfig
from opd.serving.connections import MAX_CONNECTIONS, BoundedServer, allow_connections
from opd.serving.hosts import HostCheck, is_loopback
from opd.serving.parent import watch_parent
from opd.serving.token import require_plain_token

LISTENER = "OPD_LISTENER"
"""Environment variable with the number of the inherited socket that a child listens on."""
GRACE_S = 5  # for open responses when the process is asked to end

log = logging.getLogger("opd.serving")


def serve(
    make_app: Callable[[], FastAPI],
    config: ServingConfig,
    *,
    token: str | None,
    variable: str,
    max_connections: int = MAX_CONNECTIONS,
) -> None:
    """Bind, make the application, serve until SIGTERM or SIGINT; the port file is written once ready.

    ``variable`` is the environment variable of the token. ``ValueError`` when the address is in use,
    when it is not loopback and there is no token, when no header could carry the token, or when the
    folder of the port file is missing.
    """
    if config.exit_with_parent:
        watch_parent(_end)
    require_plain_token(token, variable)
    _require_token_beyond_loopback(config.host, token, variable)
    if config.port_file is not None and not Path(config.port_file).parent.is_dir():
        raise ValueError(
            f"port_file={config.port_file}: there is no folder {Path(config.port_file).parent}; "
            "make it, or name another file"
        )
    most = allow_connections(max_connections)
    with _bind(config.host, config.port) as listener:
        app: ASGIApp = make_app()
        if not token:
            app = HostCheck(app, config.allowed_hosts)
        server = uvicorn.Config(
            app,
            log_config=None,
            log_level="warning",
            access_log=False,
            ws="none",
            timeout_graceful_shutdown=GRACE_S,
        )
        listener.listen(most)  # from here on a connection waits and does not fail
        port = listener.getsockname()[1]
        if config.port_file is not None:
            _write_atomically(Path(config.port_file), str(port))
        log.info("ready on http://%s:%d", config.host, port)
        BoundedServer(server, max_connections=most).run(sockets=[listener])


def _require_token_beyond_loopback(host: str, token: str | None, variable: str) -> None:
    if not (is_loopback(host) or token):
        raise ValueError(
            f"host {host} can be reached from other machines and no token is set; "
            f"set {variable} to a random secret here and where the trainer runs"
        )


def _bind(host: str, port: int) -> socket.socket:
    inherited = os.environ.pop(LISTENER, None)
    if inherited is not None:
        return socket.socket(fileno=int(inherited))
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except OSError as error:
        listener.close()
        raise ValueError(f"cannot bind {host}:{port}: {error}; choose another port") from error
    return listener


def _write_atomically(path: Path, text: str) -> None:
    """Readers see no file or a whole one."""
    partial = path.with_name(f"{path.name}.{os.getpid()}")
    partial.write_text(text)
    partial.replace(path)


def _end() -> None:
    """End this process: an orphan would keep its GPUs."""
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(2 * GRACE_S)
    os._exit(1)
