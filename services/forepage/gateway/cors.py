"""CORS for the web origins that the settings name; a refused preflight is an error like every other.

The outermost middleware where origins are named, so it answers preflights before a request has a scope.
"""

import uuid

from starlette.datastructures import Headers
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import Response

from forepage.errors import RequestError
from forepage.gateway.http_errors import error_response
from forepage.gateway.request_scope import REQUEST_ID_HEADER


class PreflightError(RequestError):
    """A web page asked for an origin, method or header that is not allowed."""

    code = "cors_not_allowed"


class CorsMiddleware(CORSMiddleware):
    """Starlette's, whose refusals are plain text."""

    def preflight_response(self, request_headers: Headers) -> Response:
        """What a browser asks before it sends a page's request."""
        answer = super().preflight_response(request_headers)
        if answer.status_code < 400:
            return answer
        kept = {
            name: value
            for name, value in answer.headers.items()
            if name not in ("content-length", "content-type")
        }
        request_id = uuid.uuid4().hex
        error = PreflightError(
            "this origin, method or header is not allowed to web pages: origins are named in "
            "FOREPAGE_GATEWAY__CORS_ORIGINS"
        )
        return error_response(error, request_id, {**kept, REQUEST_ID_HEADER: request_id})
