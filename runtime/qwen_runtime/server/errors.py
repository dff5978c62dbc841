"""What the runtime raises, as OpenAI's clients read it."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.types import Scope

from qwen_runtime.errors import (
    CapacityError,
    EngineClosedError,
    QueueFullError,
    QwenRuntimeError,
    RequestError,
)
from qwen_runtime.server.lifecycle import NotReadyError

__all__ = ["REQUEST_ID", "ApiError", "api_error", "error_response", "exception_handlers"]

REQUEST_ID = "qwen_runtime.request_id"
"""Where a request's scope has the id under which it is logged and answered."""

_LOG = logging.getLogger("qwen_runtime.server")
_RETRY = {"retry-after": "1"}


class ApiError(Exception):
    """An answer that is an error.

    Args:
        status: HTTP status.
        message: One sentence for the client.
        param: The field at fault.
        code: A word for programs.
        kind: OpenAI's type of error.
        headers: Headers beside the usual ones.
    """

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        *,
        kind: str = "invalid_request_error",
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.code = code
        self.kind = kind
        self.headers = dict(headers or {})

    def document(self) -> dict[str, Any]:
        """The body: an object ``error``."""
        return {
            "error": {
                "message": self.message,
                "type": self.kind,
                "param": self.param,
                "code": self.code,
            }
        }


def api_error(error: Exception, scope: Scope) -> ApiError:
    """Find the answer to what was raised. What nobody expected is logged, and told to no client.

    Args:
        error: Anything a request raised.
        scope: Of the request, whose id is logged.
    """
    if isinstance(error, ApiError):
        return error
    message = str(error)
    if isinstance(error, NotReadyError | EngineClosedError):
        code = "server_unavailable"
        return ApiError(503, message, code=code, kind="server_error", headers=_RETRY)
    if isinstance(error, QueueFullError):
        return ApiError(429, message, code="queue_full", kind="rate_limit_error", headers=_RETRY)
    if isinstance(error, CapacityError):
        return ApiError(400, message, error.param, "context_length_exceeded")
    if isinstance(error, RequestError):
        return ApiError(400, message, error.param, "invalid_value")
    _LOG.error("request %s failed", scope[REQUEST_ID], exc_info=error)
    if isinstance(error, QwenRuntimeError):
        return ApiError(500, message, code="engine_failed", kind="server_error")
    return ApiError(500, "the server failed; its log tells why", kind="server_error")


def error_response(error: Exception, scope: Scope) -> Response:
    """The same as a response."""
    answer = api_error(error, scope)
    return JSONResponse(answer.document(), answer.status, answer.headers)


async def _handle(request: Request, error: Exception) -> Response:
    return error_response(error, request.scope)


async def _handle_http(request: Request, error: Exception) -> Response:
    """Routes that do not exist, and methods that they do not have."""
    assert isinstance(error, HTTPException)
    path = request.url.path
    if error.status_code == 405:
        message = f"{path:.200} must be asked another way than by {request.method}"
        message += f": {error.headers['Allow']}" if error.headers else ""
    elif error.status_code == 404:
        message = f"{path:.200} is no address of this API; /openapi.json lists them"
    else:
        message = error.detail
    code = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code)
    answer = ApiError(error.status_code, message, None, code, headers=error.headers)
    return error_response(answer, request.scope)


async def _handle_disconnect(_: Request, error: Exception) -> Response:
    # Nobody reads it; the log shows what proxies write there.
    return Response(status_code=499)


exception_handlers = {
    ApiError: _handle,
    ClientDisconnect: _handle_disconnect,
    HTTPException: _handle_http,
    QwenRuntimeError: _handle,
}
"""For ``Starlette(exception_handlers=...)``."""
