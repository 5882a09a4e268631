"""Errors as OpenAI's API has them."""

from __future__ import annotations

import msgspec

# status -> the error's type, by which clients tell errors apart
TYPES = {
    400: "BadRequestError",
    401: "AuthenticationError",
    403: "PermissionDeniedError",
    404: "NotFoundError",
    405: "MethodNotAllowedError",
    408: "RequestTimeoutError",
    413: "RequestTooLargeError",
    429: "RateLimitError",
    431: "HeadersTooLargeError",
    499: "CancelledError",
    500: "InternalServerError",
    503: "ServiceUnavailableError",
    504: "DeadlineExceededError",
}


class ApiError(Exception):
    """An answer other than the one asked for. `param`: the field of the body that is to blame; `type` and `code`
    follow from the status unless they are given."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        type: str | None = None,
        param: str | None = None,
        code: int | str | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param = status, message, param
        self.type = TYPES.get(status, "APIError") if type is None else type
        self.code = status if code is None else code

    def body(self) -> bytes:
        """The JSON body of the answer."""
        error = {"message": self.message, "type": self.type, "param": self.param, "code": self.code}
        return msgspec.json.encode({"error": error})


def end_problem(reason: str, error: str | None) -> ApiError | None:
    """Why a choice that ended for `reason` has no complete answer; None if it has one."""
    match reason:
        case "stop" | "length":
            return None
        case "deadline":
            return ApiError(504, "the deadline of the request passed before its end: allow more time, or fewer tokens")
        case "cancelled":
            return ApiError(499, "the request was cancelled")
    return ApiError(500, error or "the request failed")
