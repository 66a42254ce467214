"""Requests to an opd service, with retries after transient failures."""

import logging
import random
import ssl
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import httpx
from safetensors import SafetensorError

from opd.serving.receiving import Oversized, Stalled, receive
from opd.serving.token import require_plain_token

FIRST_BACKOFF_S = 0.5
MAX_BACKOFF_S = 30.0
MAX_SAME_FAILURES = 3
CONFLICT = 409
TRANSIENT = (408, CONFLICT, 502, 504)
BUSY = (429, 503)
MAX_RESPONSE_BYTES = 4 << 30
KEEP_ALIVE_S = 2.0
"""Less than a server keeps an idle connection: one that is used again must not just be closing."""
CHUNK_BYTES = 1 << 20
EXCERPT_CHARACTERS = 500

Parsed = TypeVar("Parsed")

log = logging.getLogger("opd.serving")


@dataclass(frozen=True, slots=True)
class _Failure:
    """What went wrong with one attempt. ``kind``: how, if a server that works would not fail so often.

    ``is_busy``: the server refused it for the time being, which spends no retry.
    """

    text: str
    kind: str | None = None
    is_busy: bool = False


class ServiceClient:
    """Sends to one address; safe to call from several threads.

    ``name`` names the service in errors and ``remedy`` says what to do when it cannot be reached. A
    request times out ``timeout`` seconds after the last progress that its server reported, or after it
    was sent. It is repeated up to ``retries`` times after time-outs, connection errors and the statuses
    408, 409, 502 and 504. 429 and 503 spend no retry: it is repeated until the server has been busy for
    ``timeout`` seconds. Three times in a row without a response in time, or with the same other status
    from 500 on, are final: the fourth would be no other. Every endpoint must be idempotent.
    ``ValueError`` for an address or a token that cannot be used.
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
        require_plain_token(token, f"the bearer token for {name}")
        _require_address(url, name)
        self.url = url
        self._name, self._remedy, self._retries = name, remedy, retries
        self._timeout = timeout
        self._http = httpx.Client(
            base_url=url,
            headers={"Accept-Encoding": "identity"}
            | ({"Authorization": f"Bearer {token}"} if token else {}),
            limits=httpx.Limits(keepalive_expiry=KEEP_ALIVE_S),
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
        tokens: int = 1,
        max_bytes: int = MAX_RESPONSE_BYTES,
    ) -> httpx.Response:
        """The response, of at most ``max_bytes``; ``tokens`` is the size of the work that it needs.

        ``ValueError`` when refused, ``ConnectionError`` after the last attempt.
        """
        started, failures = time.monotonic(), list[_Failure]()
        headers = {"Content-Length": str(len(body)), **(headers or {})} if body else headers
        attempts = 1 + (self._retries if retries is None else retries)
        busy_since: float | None = None
        while sum(not f.is_busy for f in failures) < attempts and not _is_final(failures):
            if failures:
                time.sleep(_backoff(len(failures)))
            outcome = self._attempt(method, path, body, headers, tokens, max_bytes)
            if isinstance(outcome, httpx.Response):
                return outcome
            if not failures and (attempts > 1 or outcome.is_busy):
                log.warning("%s at %s: %s; trying again", self._name, self.url, outcome.text)
            failures.append(outcome)
            busy_since = (busy_since or time.monotonic()) if outcome.is_busy else None
            if busy_since is not None and time.monotonic() - busy_since > self._timeout:
                break
        seconds, last = time.monotonic() - started, failures[-1].text
        if _is_final(failures):
            raise ConnectionError(
                f"{self._name} at {self.url} failed {method} {path} {MAX_SAME_FAILURES} times in the same "
                f"way: {last}; see the log of that server"
            )
        raise ConnectionError(
            f"{self._name} at {self.url} failed {len(failures)} times in {seconds:.0f} s, last with "
            f"{last}; {self._remedy}"
        )

    def _attempt(
        self,
        method: str,
        path: str,
        body: bytes,
        headers: Mapping[str, str] | None,
        tokens: int,
        max_bytes: int,
    ) -> httpx.Response | _Failure:
        """One request. ``ValueError`` when it is refused, or when no attempt could succeed."""
        content = _chunks(body) if body else None
        try:
            with self._http.stream(method, path, content=content, headers=headers) as stream:
                response = receive(
                    stream, timeout=self._timeout, max_bytes=max_bytes, tokens=tokens
                )
        except (httpx.ReadTimeout, httpx.WriteTimeout, Stalled):
            text = f"no response in {self._timeout:g} s (a longer timeout may help)"
            return _Failure(text, kind="timeout")
        except Oversized as error:
            raise ValueError(
                f"the response of {self._name} at {self.url} to {method} {path} is refused: {error}; is "
                "another service, or another version of opd, at this address?"
            ) from error
        except httpx.RequestError as error:
            if _is_about_tls(error):
                raise ValueError(
                    f"{self._name} at {self.url} cannot be reached by https ({error}): use http://, or "
                    "an address that its certificate is for"
                ) from error
            return _Failure(f"{type(error).__name__}: {error}".rstrip(": "))
        if response.is_success:
            return response
        found = f"HTTP {response.status_code}: {_excerpt(response)}"
        if response.status_code in (*TRANSIENT, *BUSY):
            return _Failure(found, is_busy=response.status_code in BUSY)
        if response.status_code >= 500:
            return _Failure(found, kind=f"HTTP {response.status_code}")
        raise ValueError(f"{self._name} at {self.url} refused {method} {path}: {found}")


def parsed(
    response: httpx.Response, parse: Callable[[httpx.Response], Parsed], expected: str
) -> Parsed:
    """``parse(response)``; ``ValueError`` that says what came when it is not ``expected``."""
    try:
        return parse(response)
    except (ValueError, TypeError, KeyError, SafetensorError) as error:
        kind = response.headers.get("content-type", "no content type")
        raise ValueError(
            f"{response.request.url} returned {len(response.content)} bytes ({kind}) that are not "
            f"{expected} ({error!r}): is another service, or another version of opd, at this address?"
        ) from error


def _require_address(url: str, name: str) -> None:
    try:
        address = httpx.URL(url)
    except httpx.InvalidURL as error:
        raise ValueError(
            f"{url!r} is no address of {name} ({error}): allowed is http://HOST:PORT"
        ) from error
    if address.scheme not in ("http", "https") or not address.host:
        raise ValueError(
            f"{url!r} is no address of {name}: allowed is http://HOST:PORT or https://HOST:PORT"
        )


def _is_final(failures: Sequence[_Failure]) -> bool:
    last = failures[-MAX_SAME_FAILURES:]
    kinds = {failure.kind for failure in last}
    return len(last) == MAX_SAME_FAILURES and len(kinds) == 1 and None not in kinds


def _is_about_tls(error: BaseException | None) -> bool:
    """Whether an error was caused by a failed handshake or certificate."""
    while error is not None:
        if isinstance(error, ssl.SSLError):
            return not isinstance(error, ssl.SSLEOFError | ssl.SSLZeroReturnError)
        error = error.__cause__ or error.__context__
    return False


def _excerpt(response: httpx.Response) -> str:
    """The server's words in one line, or what the status means."""
    if response.has_redirect_location:
        return f"moved to {response.headers['location']}; use that address"
    words = " ".join(response.text.split())[:EXCERPT_CHARACTERS]
    return words or response.reason_phrase or "no reason given"


def _chunks(body: bytes) -> Iterator[bytes]:
    """Chunks of a body: the transport copies what is left of a chunk after each write."""
    for start in range(0, len(body), CHUNK_BYTES):
        yield body[start : start + CHUNK_BYTES]


def _backoff(attempt: int) -> float:
    """Seconds: doubling, at most half a minute, with jitter so that ranks do not retry together."""
    return min(MAX_BACKOFF_S, FIRST_BACKOFF_S * 2 ** (attempt - 1)) * random.uniform(0.5, 1.5)
