"""Which Host and Origin headers a service without a token accepts: no web page may reach it.

A page in a browser on the same machine can send requests to a loopback address. It names its own site in
Host when that name resolves to 127.0.0.1 (DNS rebinding), and itself in Origin otherwise. A token keeps it
out; a service that has none accepts requests for its own names only, and none with an Origin.
"""

import ipaddress
from collections.abc import Collection

from fastapi.responses import PlainTextResponse
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

LOOPBACK_NAMES = ("localhost", "localhost.localdomain", "ip6-localhost")


class HostCheck:
    """An application whose requests must name a loopback address or one of ``names`` in Host."""

    def __init__(self, app: ASGIApp, names: Collection[str]) -> None:
        self._app = app
        self._names = {name.lower() for name in names}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See ASGI."""
        reason = self._refusal(Headers(scope=scope)) if scope["type"] == "http" else None
        if reason is None:
            await self._app(scope, receive, send)
        else:
            await PlainTextResponse(reason, status_code=403)(scope, receive, send)

    def _refusal(self, headers: Headers) -> str | None:
        name = host_name(headers.get("host", ""))
        if not (is_loopback(name) or name in self._names):
            return f"Host {name[:60]!r} is not a name of this service: set allowed_hosts, or give it a token"
        if "origin" in headers:
            return "this service has no token and answers no web pages: give it a token"
        return None


def host_name(header: str) -> str:
    """The name in a Host header, in lower case, without port and brackets."""
    if header.startswith("["):
        return header[1:].partition("]")[0].lower()
    return header.partition(":")[0].lower()


def is_loopback(name: str) -> bool:
    """Whether a host name or address can only be this machine's loopback interface."""
    if name in LOOPBACK_NAMES:
        return True
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False
