"""Requests to an opd service, with retries after transient failures."""

import random
import time
from collections.abc import Iterator, Mapping

import httpx

FIRST_BACKOFF_S = 0.5
MAX_BACKOFF_S = 30.0
CONFLICT = 409
CHUNK_BYTES = 1 << 20


class ServiceClient:
    """Sends to one address; safe to call from several threads.

    ``name`` names the service in errors and ``remedy`` says what to do when it cannot be reached. A
    request times out after ``timeout`` seconds and is repeated up to ``retries`` times after connection
    errors, time-outs, statuses from 500 on and 409, so every endpoint must be idempotent.
    """

    def __init__(
        self,
        url: str,
        *,
        name: str,
        remedy: str,
        token: str | None,
        timeout: float,
        retries: int,
    ) -> None:
        self.url = url
        self._name, self._remedy, self._retries = name, remedy, retries
        self._http = httpx.Client(
            base_url=url,
            headers={"Authorization": f"Bearer {token}"} if token else {},
            timeout=httpx.Timeout(timeout, connect=min(timeout, 10.0)),
            trust_env=False,  # a proxy named in the environment must see neither token nor tokens
        )

    def send(
        self,
        method: str,
        path: str,
        body: bytes = b"",
        headers: Mapping[str, str] | None = None,
        *,
        retries: int | None = None,
    ) -> httpx.Response:
        """The response. ``ValueError`` when refused, ``ConnectionError`` after the last attempt."""
        started, failure = time.monotonic(), ""
        headers = {"Content-Length": str(len(body)), **(headers or {})} if body else headers
        attempts = 1 + (self._retries if retries is None else retries)
        for attempt in range(attempts):
            if attempt:
                time.sleep(_backoff(attempt))
            try:
                content = _chunks(body) if body else None
                response = self._http.request(method, path, content=content, headers=headers)
            except httpx.TransportError as error:
                failure = f"{type(error).__name__}: {error}"
                continue
            if response.is_success:
                return response
            failure = f"HTTP {response.status_code}: {response.text[:500]}"
            if response.status_code < 500 and response.status_code != CONFLICT:
                raise ValueError(f"{self._name} at {self.url} refused {method} {path}: {failure}")
        raise ConnectionError(
            f"{self._name} at {self.url} failed {attempts} times in "
            f"{time.monotonic() - started:.0f} s, last with {failure}; {self._remedy}"
        )


def _chunks(body: bytes) -> Iterator[bytes]:
    """Chunks of a body: the transport copies what is left of a chunk after each write."""
    for start in range(0, len(body), CHUNK_BYTES):
        yield body[start : start + CHUNK_BYTES]


def _backoff(attempt: int) -> float:
    """Seconds: doubling, at most half a minute, with jitter so that ranks do not retry together."""
    return min(MAX_BACKOFF_S, FIRST_BACKOFF_S * 2 ** (attempt - 1)) * random.uniform(0.5, 1.5)
