"""Every exception that crosses a module border, and the one value that is not an exception.

    EnergyError                     has a stable `code`, a message, and perhaps a hint
      RequestError                  the caller must change something          HTTP 4xx
        MalformedError              400, the body or a parameter cannot be read
        UnauthorizedError           401
        ForbiddenError              403
        NotFoundError               404
        ConflictError               409
        TooLargeError               413
        UnsupportedMediaError       415
        UnprocessableError          422, well formed, but it cannot be
      StorageError                  resend exactly as it was, later           HTTP 503
        OverloadedError             the queue is full
      SetupError                    refuse to start                           exit status 2
        UnreachableError            the database or service is not there      exit status 3

A class's docstring is its default message. The fault of a single reading is data, a `Rejection`,
because it must not cost the other readings of its body anything.
"""

from typing import Any, ClassVar

import msgspec


class EnergyError(Exception):
    """Something went wrong."""

    code: str = "error"

    def __init__(
        self, message: str | None = None, *, code: str | None = None, hint: str | None = None
    ) -> None:
        self.message = message or (type(self).__doc__ or "").strip()
        self.hint = hint
        if code is not None:
            self.code = code
        super().__init__(self.message if hint is None else f"{self.message} ({hint})")


class RequestError(EnergyError):
    """The request cannot be carried out as it is."""

    status: ClassVar[int] = 400
    code = "bad_request"

    def __init__(
        self,
        message: str | None = None,
        *,
        code: str | None = None,
        hint: str | None = None,
        **extra: Any,
    ) -> None:
        super().__init__(message, code=code, hint=hint)
        self.extra = extra  # further members of the problem document


class MalformedError(RequestError):
    """The request cannot be read."""

    code = "malformed"


class UnauthorizedError(RequestError):
    """A valid API key is needed: `Authorization: Bearer <key>`."""

    status = 401
    code = "unauthorized"


class ForbiddenError(RequestError):
    """This key does not have the right to do that."""

    status = 403
    code = "forbidden"


class NotFoundError(RequestError):
    """There is no such thing."""

    status = 404
    code = "not_found"


class ConflictError(RequestError):
    """What is stored already contradicts this."""

    status = 409
    code = "conflict"


class TooLargeError(RequestError):
    """The body is over the size limit."""

    status = 413
    code = "too_large"


class UnsupportedMediaError(RequestError):
    """The body's content type or coding is not known here."""

    status = 415
    code = "unsupported_media_type"


class UnprocessableError(RequestError):
    """The request is well formed, but cannot be."""

    status = 422
    code = "unprocessable"


class StorageError(EnergyError):
    """The database is not reachable; nothing of this request was stored, so send it again."""

    code = "database_unavailable"
    retry_after_seconds: ClassVar[int] = 2


class OverloadedError(StorageError):
    """The ingest queue is full; nothing of this request was stored, so send it again."""

    code = "queue_full"
    retry_after_seconds = 1


class SetupError(EnergyError):
    """The platform cannot start like this."""

    code = "setup"


class UnreachableError(SetupError):
    """The database cannot be reached."""

    code = "unreachable"


class Rejection(msgspec.Struct, frozen=True):
    """Why one reading is not taken: a stable code, the field's path, and the reason in words."""

    code: str
    path: str
    detail: str
    device_id: str | None = None  # where it could be read
