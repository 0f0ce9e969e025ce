"""Why a request is refused, in the words and the form of OpenAI's protocol."""

from __future__ import annotations

from typing import Any

from saelab.errors import SaelabError


class Refused(SaelabError):
    """A request that is not answered: an HTTP status, and what the client is told."""

    def __init__(self, message: str, status: int = 400, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.param, self.code = status, param, code

    def content(self) -> dict[str, Any]:
        """The JSON of the answer."""
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}
