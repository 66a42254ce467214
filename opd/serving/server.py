"""One HTTP service in a process of its own: where it listens, whom it lets in, when it ends."""

import hmac
import ipaddress
import logging
import os
import signal
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path

import uvicorn
from fastapi import FastAPI, Request, Response
from fastapi.responses import PlainTextResponse

MEDIA_TYPE = "application/octet-stream"
PARENT_POLL_S = 0.5
MOST_CONNECTIONS = 256  # further ones get 503, which clients try again
GRACE_S = 5  # for answers under way when asked to end

log = logging.getLogger("opd.serving")


class Refusal(Exception):
    """A status below 500 and one clear sentence for the client."""

    def __init__(self, status: int, sentence: str) -> None:
        super().__init__(sentence)
        self.status = status


def bare_app(title: str) -> FastAPI:
    """An application that says refusals as plain text and has GET /health."""
    app = FastAPI(title=title, docs_url=None, redoc_url=None, openapi_url=None)

    @app.exception_handler(Refusal)
    async def refuse(_: Request, refusal: Refusal) -> Response:
        return PlainTextResponse(str(refusal), status_code=refusal.status)

    @app.get("/health")
    async def health() -> Response:
        return PlainTextResponse("ok")

    return app


def require_token(request: Request, token: str | None, variable: str) -> None:
    """Constant time, so that a wrong token tells nothing of the right one."""
    given = request.headers.get("authorization", "")
    if token and not hmac.compare_digest(given.encode(), f"Bearer {token}".encode()):
        raise Refusal(401, f"the bearer token is missing or wrong; set {variable}")


async def read_body(request: Request, limit: int) -> bytes:
    """The body, given up as soon as it is too large; the type keeps web pages from posting here."""
    if request.headers.get("content-type") != MEDIA_TYPE:
        raise Refusal(415, f"the content type must be {MEDIA_TYPE}")
    parts, size = [], 0
    async for part in request.stream():
        size += len(part)
        if size > limit:
            raise Refusal(413, f"the request is larger than {limit} bytes")
        parts.append(part)
    return b"".join(parts)


def serve(
    make_app: Callable[[], FastAPI],
    *,
    host: str,
    port: int,
    port_file: str | None,
    token: str | None,
    variable: str,
    exit_with_parent: bool,
) -> None:
    """Bind, make the application, serve until SIGTERM or SIGINT; ``port_file`` gets the port once ready.

    ``ValueError`` when the address is taken, or not loopback and there is no token.
    """
    if exit_with_parent:
        threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
    _require_token_beyond_loopback(host, token, variable)
    with _bound(host, port) as listener:
        config = uvicorn.Config(
            make_app(),
            log_config=None,
            log_level="warning",
            access_log=False,
            limit_concurrency=MOST_CONNECTIONS,
            timeout_graceful_shutdown=GRACE_S,
        )
        listener.listen(MOST_CONNECTIONS)  # from here on a connection waits instead of failing
        bound_port = listener.getsockname()[1]
        if port_file is not None:
            _write_whole(Path(port_file), str(bound_port))
        log.info("ready on http://%s:%d", host, bound_port)
        uvicorn.Server(config).run(sockets=[listener])


def _require_token_beyond_loopback(host: str, token: str | None, variable: str) -> None:
    loopback = host == "localhost" or _is_loopback(host)
    if not (loopback or token):
        raise ValueError(
            f"host {host} can be reached from other machines and no token is set; "
            f"set {variable} to a random secret here and where the trainer runs"
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
