"""JSON requests to a model's server: several at a time, each within a time limit, asked again while it is busy."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import AsyncIterator, Coroutine
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import datetime, timezone
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    import httpx

_BACKOFF = 0.5  # seconds before the second try, doubled for each further one
_LONGEST = 200  # characters of a reason
NOTHING = -9999.0  # what vLLM writes for a log-prob of -inf, which JSON has not
KEY = "OPENAI_API_KEY"  # the environment variable with the key, unless another is named

T = TypeVar("T")


class UnansweredError(Exception):
    """There is no answer; the text is the reason."""


class SilentError(UnansweredError):
    """Nor was there one for anything else: the server is busy, fails, or is not there."""


class _BusyError(Exception):
    """Worth another try. wait: seconds that the endpoint asks to wait before it."""

    def __init__(self, reason: str, wait: float = 0.0) -> None:
        super().__init__(reason)
        self.wait = wait


@dataclass(frozen=True)
class Endpoint:
    """url: the base of what is asked. most_bytes: of a reply."""

    client: httpx.AsyncClient
    url: str
    most_bytes: int
    key: str = field(repr=False)

    async def ask(self, path: str, request: dict[str, Any] | None, seconds: float, tries: int) -> Any:
        """The reply's JSON; UnansweredError says why there is none. request: what is posted; None gets what is there.
        seconds: the limit over all tries; each may take an equal share of what is left. It is asked again while the
        endpoint is busy (429), fails (5xx), is silent or hangs up."""
        body = await self._tried(path, request, seconds, tries)
        try:
            return json.loads(body)
        except (ValueError, RecursionError):
            raise UnansweredError(f"unreadable reply: {body.decode(errors='replace')}") from None

    async def tell(self, path: str, request: dict[str, Any], seconds: float, tries: int) -> None:
        """The same where there is nothing to read in the reply."""
        await self._tried(path, request, seconds, tries)

    async def _tried(self, path: str, request: dict[str, Any] | None, seconds: float, tries: int) -> bytes:
        clock = asyncio.get_running_loop().time
        end = clock() + seconds
        for attempt in range(tries):
            share = (end - clock()) / (tries - attempt)
            try:
                return await asyncio.wait_for(self._send(path, request), share)
            except asyncio.TimeoutError:
                failure = _BusyError(f"no answer within {share:.3g} s")
            except _BusyError as error:
                failure = error
            wait = max(failure.wait, _BACKOFF * 2**attempt)
            if attempt + 1 == tries:
                break
            if clock() + wait >= end:
                raise SilentError(f"out of time after {seconds:g} s: {failure}")
            await asyncio.sleep(wait)
        raise SilentError(f"{failure} (tries: {tries})")

    async def _send(self, path: str, request: dict[str, Any] | None) -> bytes:
        """Redirects are not followed: the key is for this address. Nothing is unpacked: ten packed kilobytes can hold
        gigabytes, and unpacking them ignores every limit."""
        import httpx  # noqa: PLC0415

        headers = {"Accept-Encoding": "identity"}
        if self.key:
            headers["Authorization"] = f"Bearer {self.key}"
        body = bytearray()
        call = {"method": "GET"} if request is None else {"method": "POST", "json": request}
        try:
            async with self.client.stream(url=self.url + path, headers=headers, **call) as reply:
                if reply.status_code == 429 or reply.status_code >= 500:
                    raise _BusyError(f"HTTP {reply.status_code}", _retry_after(reply.headers.get("Retry-After", "")))
                if reply.status_code != 200:
                    raise UnansweredError(f"HTTP {reply.status_code}")
                packing = reply.headers.get("Content-Encoding", "identity").strip().lower()
                if packing not in ("", "identity"):
                    raise UnansweredError(f"unreadable reply: packed ({packing}), which was not asked for")
                async for part in reply.aiter_raw():
                    body += part
                    if len(body) > self.most_bytes:
                        raise UnansweredError(f"unreadable reply: more than {self.most_bytes} bytes")
        except httpx.TransportError as error:
            raise _BusyError(f"no answer: {type(error).__name__}") from None
        return bytes(body)

    def reason(self, error: Exception) -> str:
        """One line for a reader, without the key: the text of an unexpected error might show it."""
        if not isinstance(error, UnansweredError):
            return f"failed: {type(error).__name__}"
        text = str(error).replace(self.key, "***") if self.key else str(error)
        return " ".join(text[: 10 * _LONGEST].split())[:_LONGEST]


def check_server(server: Any, *counts: str) -> None:
    """Of a detector with a url; counts: names of its settings that are at least 1."""
    if not server.url.startswith(("http://", "https://")):
        raise ValueError("url: expected the endpoint's base, http://... or https://...")  # it may hold a password
    for name in counts:
        if getattr(server, name) < 1:
            raise ValueError(f"{name}: got {getattr(server, name)}, expected at least 1")


@asynccontextmanager
async def opened(url: str, api_key_env: str, most_bytes: int) -> AsyncIterator[Endpoint]:
    """api_key_env: the environment variable with the key; without it none is sent."""
    import httpx  # noqa: PLC0415

    async with httpx.AsyncClient(timeout=None, limits=httpx.Limits(max_connections=None)) as client:
        yield Endpoint(client, url, most_bytes, os.environ.get(api_key_env, "").strip())


def tokens_used(reply: Any) -> int:
    """Of the request and what was made of it, as far as the endpoint says."""
    usage = reply.get("usage") if isinstance(reply, dict) else None
    total = usage.get("total_tokens") if isinstance(usage, dict) else None
    return total if isinstance(total, int) else 0


def run(work: Coroutine[Any, Any, T]) -> T:
    """Here, where Ctrl-C ends it, or in a thread of its own if an event loop runs here already, as in a notebook."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(work)
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(asyncio.run, work).result()


def why_not(error: Exception) -> str:
    """Why no request was made at all: httpx is missing, or the surroundings (certificates, proxies)."""
    if isinstance(error, ImportError):
        return f"failed: {error}; it comes with prefixloss[detect]"
    return f"failed: {type(error).__name__}"


def _retry_after(value: str) -> float:
    """Seconds to wait, from either form of the header: a number or a date."""
    if value.strip().replace(".", "", 1).isdecimal():
        return float(value)
    try:
        date = parsedate_to_datetime(value)
    except (ValueError, OverflowError):
        return 0.0
    return (date.astimezone(timezone.utc) - datetime.now(timezone.utc)).total_seconds()
