"""As much of the hub's HTTP interface as an upload of a folder and its download need, in memory.

Written from what huggingface_hub's client sends and reads: POST /api/repos/create, …/preupload, the Git LFS batch with
its PUTs, …/commit with a line of JSON a file; then GET …/revision and HEAD or GET …/resolve. Xet storage is not spoken.
"""

import base64
import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any
from urllib.parse import unquote

SHA = "0123456789abcdef0123456789abcdef01234567"  # of every commit
TOKEN = "hf_of_a_test"


class Hub(ThreadingHTTPServer):
    """Repositories by name: whether they are private, and their files."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.private: dict[str, bool] = {}
        self.files: dict[str, dict[str, bytes]] = {}
        self.blobs: dict[str, bytes] = {}
        self.messages: list[str] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Handler(BaseHTTPRequestHandler):
    """One request."""

    server: Hub

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing."""

    def answer(self, value: Any, status: int = 200, **headers: str) -> None:
        body = value if isinstance(value, bytes) else json.dumps(value).encode()
        self.send_response(status)
        for name, content in headers.items():
            self.send_header(name.replace("_", "-"), content)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def refused(self) -> bool:
        if self.headers.get("Authorization") == f"Bearer {TOKEN}":
            return False
        self.body()
        self.answer({"error": "Invalid username or password."}, 401)
        return True

    def do_POST(self) -> None:
        if self.refused():
            return
        path = self.path.split("?")[0]
        if path == "/api/repos/create":
            asked = json.loads(self.body())
            name = f"{asked['organization']}/{asked['name']}"
            self.server.private.setdefault(name, asked.get("visibility") == "private" or bool(asked.get("private")))
            self.server.files.setdefault(name, {})
            self.answer({"url": f"{self.server.url}/{name}", "name": name, "id": "1"})
        elif path == "/api/validate-yaml":
            asked = json.loads(self.body())
            self.answer(
                {"errors": [] if asked["content"].startswith("---\n") else [{"message": "no header"}], "warnings": []}
            )
        elif "/preupload/" in path:
            files = [
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if file["path"].endswith((".safetensors", ".model")) else "regular",
                    "shouldIgnore": False,
                    "oid": None,
                }
                for file in json.loads(self.body())["files"]
            ]
            self.answer({"files": files})
        elif path.endswith("/info/lfs/objects/batch"):
            objects = [
                thing | {"actions": {"upload": {"href": f"{self.server.url}/lfs/{thing['oid']}"}}}
                for thing in json.loads(self.body())["objects"]
            ]
            self.answer({"transfer": "basic", "objects": objects})
        elif "/commit/" in path:
            self.commit(path.removeprefix("/api/models/").split("/commit/")[0])
        else:
            self.answer({"error": f"not known: {path}"}, 404)

    def commit(self, name: str) -> None:
        for line in self.body().splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "header":
                self.server.messages.append(value["summary"])
            elif entry["key"] == "file":
                self.server.files[name][value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                self.server.files[name][value["path"]] = self.server.blobs[value["oid"]]
        self.answer({"success": True, "commitOid": SHA, "commitUrl": f"{self.server.url}/{name}/commit/{SHA}"})

    def do_PUT(self) -> None:
        content = self.body()
        wanted = self.path.removeprefix("/lfs/")
        if hashlib.sha256(content).hexdigest() != wanted:
            self.answer({"error": "another content"}, 400)
            return
        self.server.blobs[wanted] = content
        self.answer(b"")

    def do_GET(self) -> None:
        if self.refused():
            return
        path = unquote(self.path.split("?")[0])
        if path == "/api/whoami-v2":
            self.answer({"type": "user", "name": "me", "auth": {"accessToken": {"role": "write"}}})
        elif "/tree/" in path:
            files = self.server.files[path.removeprefix("/api/models/").split("/tree/")[0]]
            self.answer(
                [
                    {"type": "file", "path": name, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
                    for name, content in sorted(files.items())
                ]
            )
        elif path.startswith("/api/models/"):
            name = path.removeprefix("/api/models/").split("/revision/")[0]
            files = [{"rfilename": file} for file in sorted(self.server.files[name])]
            self.answer({"id": name, "sha": SHA, "siblings": files, "private": self.server.private[name]})
        elif "/resolve/" in path:
            name, rest = path[1:].split("/resolve/")
            content = self.server.files[name].get(rest.partition("/")[2])
            if content is None:
                self.answer({"error": "no such file"}, 404, X_Error_Code="EntryNotFound")
            else:
                self.answer(content, ETag=f'"{hashlib.sha1(content).hexdigest()}"', X_Repo_Commit=SHA)
        else:
            self.answer({"error": f"not known: {path}"}, 404)

    def do_HEAD(self) -> None:
        self.do_GET()


@contextmanager
def hub() -> Iterator[Hub]:
    """A running hub."""
    server = Hub()
    thread = Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
