"""A hub of one dataset repository on this machine: what huggingface_hub asks of https://huggingface.co, by HTTP."""

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any


class Hub:
    """Commits of the repository `name`, each with its files; the newest one is what has no revision."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.commits: dict[str, dict[str, bytes]] = {}

    def commit(self, files: dict[str, bytes]) -> str:
        """Add a commit and return its id."""
        sha = hashlib.sha1(repr((len(self.commits), files)).encode()).hexdigest()
        self.commits[sha] = files
        return sha

    def answer(self, path: str) -> tuple[bytes, dict[str, str]] | None:
        """The body and headers of a request; None: not found."""
        newest = list(self.commits)[-1]
        if path == f"/api/datasets/{self.name}":
            files = [{"rfilename": name} for name in self.commits[newest]]
            return json.dumps({"id": self.name, "sha": newest, "siblings": files}).encode(), {}
        _, _, rest = path.partition(f"/datasets/{self.name}/resolve/")
        revision, _, file = rest.partition("/")
        revision = newest if revision == "main" else revision
        if file not in self.commits.get(revision, {}):
            return None
        content = self.commits[revision][file]
        return content, {"X-Repo-Commit": revision, "ETag": f'"{hashlib.sha1(content).hexdigest()}"'}


@contextmanager
def served(hub: Hub) -> Iterator[str]:
    """The hub's address, to be given as HF_ENDPOINT."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body, headers = hub.answer(self.path) or (b"", {})
            self.send_response(200 if body else 404)
            for name, value in (headers | {"Content-Length": str(len(body))}).items():
                self.send_header(name, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        do_HEAD = do_GET  # noqa: N815

        def log_message(self, *arguments: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()
