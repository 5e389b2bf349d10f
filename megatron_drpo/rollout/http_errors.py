"""What a failed request says: try again later, try so many times, or do not try again."""

from __future__ import annotations

import time
from datetime import UTC
from email.utils import parsedate_to_datetime
from http import HTTPStatus

import httpx

from megatron_drpo.errors import RolloutError

MAX_RETRY_AFTER_S = 60.0
"""A server that asks for a longer pause is asked again after this one."""
_NOT_DONE = frozenset({HTTPStatus.TOO_EARLY, HTTPStatus.TOO_MANY_REQUESTS, HTTPStatus.SERVICE_UNAVAILABLE})
_UNAVAILABLE = _NOT_DONE | {
    HTTPStatus.REQUEST_TIMEOUT,
    HTTPStatus.BAD_GATEWAY,
    HTTPStatus.GATEWAY_TIMEOUT,
}


class RetryableError(RolloutError):
    """A failure of the server that another attempt, or another server, may not meet."""


class ServerTimeoutError(RetryableError):
    """No answer in time."""


class ServerFailureError(RetryableError):
    """The server answered with an internal error, such as 500: perhaps because of the request."""


class UnavailableError(RetryableError):
    """The state of the server, or of what lies before it, is to blame, not the request: it answered 408, 425,
    429, 502, 503 or 504, or not with JSON."""

    def __init__(self, message: str, *, retry_after_s: float = 0.0) -> None:
        """
        Args:
            retry_after_s: for how long the server asks not to be asked again.
        """
        super().__init__(message)
        self.retry_after_s = retry_after_s


class NotDoneError(UnavailableError):
    """425, 429 or 503: the server has not begun with the request."""


class UnreachableError(UnavailableError):
    """No connection, or it broke."""


def refusal(where: str, response: httpx.Response) -> RolloutError:
    """The error of an answer that is no success.

    Args:
        where: server and endpoint, for the message.
    """
    status = response.status_code
    message = f"{where}: HTTP {status}: {_reason(response)}"
    if status in _UNAVAILABLE:
        kind = NotDoneError if status in _NOT_DONE else UnavailableError
        return kind(message, retry_after_s=read_retry_after_s(response.headers.get("Retry-After")))
    return ServerFailureError(message) if response.is_server_error else RolloutError(message)


def read_retry_after_s(value: str | None) -> float:
    """Seconds from now, of a number of seconds or a date (RFC 9110, 10.2.3); at most MAX_RETRY_AFTER_S, and 0
    for what is missing, past or malformed."""
    if value is None:
        return 0.0
    value = value.strip()
    if value.isascii() and value.isdecimal():
        return min(float(value), MAX_RETRY_AFTER_S)
    try:
        date = parsedate_to_datetime(value)
    except ValueError:
        return 0.0
    seconds = date.replace(tzinfo=date.tzinfo or UTC).timestamp() - time.time()
    return min(max(seconds, 0.0), MAX_RETRY_AFTER_S)


def _reason(response: httpx.Response) -> str:
    """What the server gave as its reason; the first line of the body if it is not of the usual form."""
    try:
        body = response.json()
    except (ValueError, RecursionError):
        message = response.text
    else:
        error = body.get("error", body.get("detail", body)) if isinstance(body, dict) else body
        message = error.get("message", error) if isinstance(error, dict) else error
    lines = str(message or "").strip().splitlines() or ["(no reason given)"]
    return lines[0][:500]
