"""Errors as OpenAI's clients read them: a status and {"error": {message, type, param, code}}."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from layersweep.errors import InputError, LayersweepError
from layersweep.problems import printable, show

UNSUPPORTED = "unsupported"  # a parameter that is known, at a value that is not served


class Refusal(Exception):
    """An HTTP status of 400 or more and what it says. `retry_after`: seconds."""

    def __init__(
        self, status: int, message: str, *, param: str | None = None, code: str | None = None,
        retry_after: int | None = None,
    ) -> None:  # fmt: skip
        super().__init__(message)
        self.status, self.param, self.code, self.retry_after = status, param, code, retry_after

    @property
    def content(self) -> dict[str, Any]:
        return {
            "error": {
                "message": str(self),
                "type": "server_error" if self.status >= 500 else "invalid_request_error",
                "param": self.param,
                "code": self.code,
            }
        }

    @property
    def body(self) -> bytes:
        """ASCII: what it quotes may be no UTF-8."""
        return json.dumps(self.content).encode()

    @property
    def headers(self) -> dict[str, str]:
        """OpenAI's clients ask again after a 500, unless they are told that it would not help."""
        after = {} if self.retry_after is None else {"retry-after": str(self.retry_after)}
        return after | ({"x-should-retry": "false"} if self.status == 500 else {})


class HungUp(Exception):
    """The client is gone, and nobody reads an answer."""


def refusal_of(error: LayersweepError) -> Refusal:
    """What the scheduler, the tokenizer or the template refused; 500 where the machine failed."""
    hint = f"; hint: {error.hint}" if error.hint else ""
    status = 400 if isinstance(error, InputError) else 500
    return Refusal(status, printable(f"{error}{hint}"))


def refusal_of_body(errors: Sequence[Mapping[str, Any]]) -> Refusal:
    """The first of pydantic's errors: 400 for no JSON and what is not served, else 422."""
    first = errors[0]
    place = [str(part) for part in first["loc"] if part != "body"]
    param = printable(".".join(place))[:100] or None
    match first["type"]:
        case "json_invalid":
            return Refusal(400, f"the body is no JSON: {first['ctx']['error']}")
        case "extra_forbidden":
            return Refusal(422, f"{param}: unknown parameter", param=param, code="unknown")
        case "unsupported":
            return Refusal(400, first["msg"], param=first["ctx"]["param"], code=UNSUPPORTED)
        case "missing":
            return Refusal(422, f"{param}: found nothing, needed a value", param=param)
    found = printable(show(first.get("input")))
    message = first["msg"].removeprefix("Value error, ")
    if param is None and not isinstance(first.get("input"), dict):
        message = "needed a JSON object, sent with `content-type: application/json`"
    return Refusal(422, f"{param or 'the body'}: found {found}: {message}", param=param)
