"""Every error is one shape: RFC 9457 `application/problem+json` with a stable `code`."""

import logging
from http import HTTPStatus
from typing import Any

import msgspec
from litestar import Request, Response
from litestar.exceptions import HTTPException, ValidationException

from energy_platform.errors import EnergyError, RequestError, StorageError, TooLargeError

_log = logging.getLogger("energy_platform.http")

MEDIA_TYPE = "application/problem+json"

AnyRequest = Request[Any, Any, Any]

# The name that HTTPStatus has for it depends on Python's version.
_CODES = {413: TooLargeError.code}


class Problem(msgspec.Struct):
    """A problem document: status, headers, and the members of the body."""

    status: int
    code: str
    detail: str
    extra: dict[str, Any] = msgspec.field(default_factory=dict)
    headers: dict[str, str] = msgspec.field(default_factory=dict)

    @property
    def body(self) -> bytes:
        return msgspec.json.encode(
            {
                "type": "about:blank",
                "title": HTTPStatus(self.status).phrase,
                "status": self.status,
                "code": self.code,
                "detail": self.detail,
                **self.extra,
            }
        )


def problem_of(error: Exception) -> Problem:
    """The problem document of any exception."""
    if isinstance(error, RequestError):
        headers = {"WWW-Authenticate": "Bearer"} if error.status == 401 else {}
        return Problem(error.status, error.code, str(error), error.extra, headers)
    if isinstance(error, StorageError):
        headers = {"Retry-After": str(error.retry_after_seconds)}
        return Problem(503, error.code, str(error), {}, headers)
    if isinstance(error, ValidationException):
        return _invalid_parameters(error)
    if isinstance(error, HTTPException):
        code = _CODES.get(error.status_code) or HTTPStatus(error.status_code).name.lower()
        return Problem(error.status_code, code, error.detail, {}, dict(error.headers or {}))
    code = error.code if isinstance(error, EnergyError) else "internal"
    return Problem(500, code, "Something went wrong here; the log has the details.")


def _invalid_parameters(error: ValidationException) -> Problem:
    extra = error.extra if isinstance(error.extra, list) else []
    details = [f"{item.get('key', 'request')}: {item.get('message', '')}" for item in extra]
    return Problem(400, "bad_parameter", "; ".join(details) or error.detail, {"errors": extra})


def answer_problem(request: AnyRequest, error: Exception) -> Response[bytes]:
    """Litestar's exception handler for everything."""
    problem = problem_of(error)
    if problem.status == 500:
        _log.error("request failed", exc_info=error, extra={"path": request.scope["path"]})
    return Response(
        problem.body, status_code=problem.status, media_type=MEDIA_TYPE, headers=problem.headers
    )
