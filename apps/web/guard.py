"""What every request to the page passes first: where it comes from, the password, whether the page needs that route.

Gradio has routes for files, uploads, proxies and more; those that this page does not use are closed here, by a list of
what it does use.
"""

import base64
import binascii
import re
import secrets
from urllib.parse import urlsplit

from apps.serve.guard import App, Receive, Scope, Send

LOCAL_NAMES = {"127.0.0.1", "localhost", "[::1]", "::1"}
PAGES = r"/(en|zh)/"
OPEN = re.compile(  # what the page asks for
    rf"/|/healthz|/favicon\.ico|{PAGES}?|{PAGES}(config|theme\.css|favicon\.ico|manifest\.json|robots\.txt)/?"
    rf"|{PAGES}(assets|static|svelte)/[\w./@-]+"
    rf"|{PAGES}gradio_api/(queue/join|queue/data|startup-events|cancel|reset|app_id|login_check|theme\.css|heartbeat/\w+)/?"
)
HEADERS = [
    # nothing is loaded from elsewhere, and no other site shows the page in a frame
    (
        b"content-security-policy",
        b"default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:; frame-ancestors 'none'",
    ),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
]


class PageGuard:
    """403 for another site's requests, 401 without the password, 404 for what the page does not need."""

    def __init__(self, app: App, login: tuple[str, str] | None, is_local: bool) -> None:
        """`login` is user and password, None if nobody is asked; `is_local`: only this machine can reach the page."""
        self.app, self.is_local = app, is_local
        self.credentials = b":".join(word.encode() for word in login) if login else None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        if scope["type"] != "http":
            return
        headers = dict(scope["headers"])
        path = scope["path"]

        async def hardened(message: dict[str, object]) -> None:
            if message["type"] == "http.response.start":
                message = message | {"headers": [*message["headers"], *HEADERS]}  # type: ignore[misc]
            await send(message)

        if not self._is_from_here(headers):
            await answer(hardened, 403, "The request comes from another site.")
        elif path != "/healthz" and not self._has_password(headers.get(b"authorization", b"")):
            await answer(hardened, 401, "User and password, please.")
        elif not OPEN.fullmatch(path) or ".." in path:
            await answer(hardened, 404, "There is nothing here.")
        else:
            await self.app(scope, receive, hardened)

    def _is_from_here(self, headers: dict[bytes, bytes]) -> bool:
        """No page of another site asks (cross-site requests), nor one that has given itself this machine's address."""
        host = headers.get(b"host", b"").decode("latin-1")
        origin = headers.get(b"origin")
        if origin is not None and urlsplit(origin.decode("latin-1")).netloc != host:
            return False
        return not self.is_local or re.sub(r":\d+$", "", host) in LOCAL_NAMES

    def _has_password(self, authorization: bytes) -> bool:
        if self.credentials is None:
            return True
        kind, _, encoded = authorization.partition(b" ")
        try:
            given = base64.b64decode(encoded, validate=True)
        except binascii.Error:
            return False
        return secrets.compare_digest(given, self.credentials) and kind.lower() == b"basic"


async def answer(send: Send, status: int, text: str) -> None:
    """A short answer in words."""
    body = text.encode()
    headers = [(b"content-type", b"text/plain; charset=utf-8"), (b"content-length", str(len(body)).encode())]
    if status == 401:
        headers.append((b"www-authenticate", b'Basic realm="glmflow", charset="UTF-8"'))
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
