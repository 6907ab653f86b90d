"""What every request passes first, as ASGI middleware: the API key, the size of its body, and the log.

Written against ASGI itself: starlette's own middleware class would hide a client's going away from the endpoint.
"""

import json
import logging
import secrets
import time
from collections.abc import Awaitable, Callable
from typing import Any

from starlette.exceptions import HTTPException

from apps.serve.metrics import Metrics

Scope = dict[str, Any]
Receive = Callable[[], Awaitable[dict[str, Any]]]
Send = Callable[[dict[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]
OPEN_PATHS = {"/healthz", "/health"}  # what a load balancer asks, without a key

log = logging.getLogger("glmflow.serve")


class Guard:
    """401 without the key, 413 beyond `max_body` bytes, one line of log for each request, never its content."""

    def __init__(self, app: App, api_key: str | None, max_body: int, metrics: Metrics, paths: set[str]) -> None:
        self.app, self.api_key, self.max_body, self.metrics, self.paths = app, api_key, max_body, metrics, paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started, status, read = time.monotonic(), 499, 0  # 499: the client was gone before an answer began

        async def counted() -> dict[str, Any]:
            nonlocal read
            message = await receive()
            read += len(message.get("body", b""))
            if read > self.max_body:
                raise HTTPException(413, f"the body has more than {self.max_body} bytes")
            return message

        async def watched(message: dict[str, Any]) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        headers = dict(scope["headers"])
        try:
            if not self._has_key(scope["path"], headers.get(b"authorization", b"")):
                await refuse(watched, 401, "invalid_api_key", "wrong or no API key: send it as a bearer token")
            elif int(headers.get(b"content-length", b"0")) > self.max_body:
                await refuse(watched, 413, "body_too_large", f"the body has more than {self.max_body} bytes")
            else:
                await self.app(scope, counted, watched)
        finally:
            path = scope["path"] if scope["path"] in self.paths else "other"
            self.metrics.responses.labels(path, str(status)).inc()
            client = (scope.get("client") or ["-"])[0]
            if path not in OPEN_PATHS:
                seconds = time.monotonic() - started
                log.info("%s %s %s %d %.2fs", client, scope["method"], path, status, seconds)

    def _has_key(self, path: str, authorization: bytes) -> bool:
        if self.api_key is None or path in OPEN_PATHS:
            return True
        kind, _, key = authorization.partition(b" ")
        return secrets.compare_digest(key, self.api_key.encode()) and kind.lower() == b"bearer"


async def refuse(send: Send, status: int, code: str, message: str) -> None:
    """Answer with an error of OpenAI's shape."""
    body = json.dumps(error_body(status, code, message)).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    if status == 401:
        headers.append((b"www-authenticate", b"Bearer"))
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def error_body(status: int, code: str, message: str) -> dict[str, Any]:
    """An error as OpenAI's clients expect it."""
    kinds = {401: "authentication_error", 429: "rate_limit_error"}
    kind = kinds.get(status, "invalid_request_error" if status < 500 else "server_error")
    return {"error": {"message": message, "type": kind, "param": None, "code": code}}
