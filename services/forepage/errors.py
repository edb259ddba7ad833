"""Every error a caller can meet, with its HTTP and gRPC status; translated once at each edge.

ForepageError
├── RequestError          the caller's fault (400); names the field
│   ├── ContextLengthError
│   ├── AuthenticationError (401)
│   └── UnknownModelError (404)
├── CapacityError         retry later (429/503 with Retry-After)
├── DeadlineError         the request's deadline passed (504)
├── DependencyError       index, cold pool, worker or Redis unreachable (503)
├── ModelFormatError      a model folder we can't or won't load
└── IntegrityError        ours: a law of the state is broken, or a record is damaged (500)
"""

from dataclasses import dataclass
from typing import ClassVar


@dataclass(eq=False)
class ForepageError(Exception):
    """Base of all; `message` tells the user what to do. Field names survive the wire, but `details`.

    Those are for our logs alone: addresses of ours, or what a library said, which may quote a request.
    """

    message: str
    param: str | None = None
    retry_after_s: float | None = None
    details: str = ""

    code: ClassVar[str] = "internal_error"
    http_status: ClassVar[int] = 500
    grpc_status: ClassVar[str] = "INTERNAL"

    def __str__(self) -> str:
        return f"{self.message} ({self.details})" if self.details else self.message


class RequestError(ForepageError):
    """The request itself is wrong; sending it again unchanged can't help."""

    code = "invalid_request_error"
    http_status = 400
    grpc_status = "INVALID_ARGUMENT"


class ContextLengthError(RequestError):
    """Prompt and requested tokens exceed what the server takes."""

    code = "context_length_exceeded"


class AuthenticationError(RequestError):
    """No API key, or one that is not known."""

    code = "invalid_api_key"
    http_status = 401
    grpc_status = "UNAUTHENTICATED"


class UnknownModelError(RequestError):
    """The request names a model that is not served here."""

    code = "model_not_found"
    http_status = 404
    grpc_status = "NOT_FOUND"


class CapacityError(ForepageError):
    """No room now; `retry_after_s` says when to come back."""

    code = "capacity_exhausted"
    http_status = 503
    grpc_status = "RESOURCE_EXHAUSTED"


class RateLimitError(CapacityError):
    """Too many requests of this client, or a full queue."""

    code = "rate_limit_exceeded"
    http_status = 429


class DeadlineError(ForepageError):
    """The request did not end within its deadline."""

    code = "deadline_exceeded"
    http_status = 504
    grpc_status = "DEADLINE_EXCEEDED"


class DependencyError(ForepageError):
    """A process this one needs is down or not answering."""

    code = "dependency_unavailable"
    http_status = 503
    grpc_status = "UNAVAILABLE"


class ModelFormatError(ForepageError):
    """A model folder that can't be loaded; the message names the file and field."""

    code = "model_format_error"
    grpc_status = "FAILED_PRECONDITION"


class IntegrityError(ForepageError):
    """A conservation law is broken or a record is damaged; never served as data."""

    code = "integrity_error"
    grpc_status = "DATA_LOSS"


def _tree(root: type[ForepageError]) -> list[type[ForepageError]]:
    return [root, *(cls for child in root.__subclasses__() for cls in _tree(child))]


ERROR_BY_CODE: dict[str, type[ForepageError]] = {cls.code: cls for cls in _tree(ForepageError)}


def error_from_code(
    code: str, message: str, *, param: str | None = None, retry_after_s: float | None = None
) -> ForepageError:
    """Rebuild an error that came over the wire; an unknown code becomes a plain ForepageError."""
    return ERROR_BY_CODE.get(code, ForepageError)(message, param, retry_after_s)
