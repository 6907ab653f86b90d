"""A Prefect server that is none, that does not want us, or that is broken: what a command says and does."""

import sys
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any, NoReturn

import pytest
from prefect import get_client
from prefect.settings import PREFECT_API_URL, PREFECT_CLIENT_MAX_RETRIES, temporary_settings

from flows import terminal
from flows.data_events import emit
from flows.server import WITHOUT_SERVER, is_up
from glm.errors import InputError


@pytest.fixture
def server() -> Iterator[tuple[str, dict[str, Any]]]:
    """An address, and what is answered there: to /health with status 200, to all else with `status`."""
    answers: dict[str, Any] = {"health": "true", "status": 200}

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            healthy = self.path.endswith("/health")
            body = str(answers["health"] if healthy else '{"exception_message": "no"}').encode()
            self.send_response(200 if healthy else answers["status"])
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def do_POST(self) -> None:
            self.do_GET()

        def log_message(self, *arguments: Any) -> None:
            pass

    found = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    Thread(target=found.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{found.server_port}/api"
    with temporary_settings({PREFECT_API_URL: url, PREFECT_CLIENT_MAX_RETRIES: 0}):
        yield url, answers
    found.shutdown()


def ask() -> int:
    """A command that has a question for the server."""
    with get_client(sync_client=True) as client:
        client.request("GET", "/admin/version")
    return 0


def test_another_program_s_page_is_no_server(server: tuple[str, dict[str, Any]]) -> None:
    url, answers = server
    assert is_up(url)
    answers["health"] = "<html>a router</html>"
    assert not is_up(url)
    with pytest.raises(InputError, match="no Prefect server answers"):
        emit(["data/new.jsonl"])


def test_a_wrong_password_is_one_line(server: tuple[str, dict[str, Any]], capsys: pytest.CaptureFixture[str]) -> None:
    url, answers = server
    answers["status"] = 401
    assert terminal.exit_status(ask, "stopped") == 1
    line = f"Prefect at {url}: 401 Unauthorized; its user:password is PREFECT_API_AUTH_STRING\n"
    assert capsys.readouterr().err == line
    with pytest.raises(InputError, match=r"was not told: .*401"):
        emit(["data/new.jsonl"])


def test_a_broken_server_is_left_alone(
    server: tuple[str, dict[str, Any]], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its health may be good all the same, as where only its database is away: so the next try must not ask it."""
    _, answers = server
    answers["status"] = 500

    def begin_again(program: str, words: list[str]) -> NoReturn:
        sys.exit(77)

    monkeypatch.setattr("os.execv", begin_again)
    monkeypatch.setenv(WITHOUT_SERVER, "")
    monkeypatch.delenv(WITHOUT_SERVER)
    with pytest.raises(SystemExit, match="77"):
        terminal.exit_status(ask, "stopped")
    assert "500 Internal Server Error; going on without it" in capsys.readouterr().err
    assert terminal.os.environ[WITHOUT_SERVER] == "1"
