"""`glmflow web`: build the page in each language, then listen."""

import asyncio
import logging
import os
import sys
import webbrowser
from pathlib import Path
from threading import Timer

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # before gradio is imported
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"

import gradio as gr
from fastapi import FastAPI, Request
from starlette.responses import PlainTextResponse, RedirectResponse, Response

from apps.serve.run import LOCAL, answer, take_address
from apps.web.guard import PageGuard
from apps.web.loaded import Models
from apps.web.page import build, theme
from apps.web.texts import LANGUAGES
from flows import ROOT
from glm.errors import InputError


def check_login(host: str, user: str | None, password: str | None) -> tuple[str, str] | None:
    """User and password that visitors must give; None: nobody but this machine's users can come.

    Raises:
        InputError: one of the two is missing, or both are where other machines can reach the page.
    """
    if user and password:
        if ":" in user:
            raise InputError(f"user: {user!r}: a colon cannot be part of it")
        return user, password
    if user or password:
        raise InputError("user, password: give both (--user and --password, GLMFLOW_WEB_USER and GLMFLOW_WEB_PASSWORD)")
    if host not in LOCAL:
        raise InputError(
            f"host: {host} can be reached from other machines, whose users could then train, promote and read: give "
            "--user and --password (or GLMFLOW_WEB_USER and GLMFLOW_WEB_PASSWORD)"
        )
    return None


def create_app(login: tuple[str, str] | None, is_local: bool, models: Models) -> FastAPI:
    """The page in every language, each below its own path, behind the guard."""
    app = FastAPI(title="glmflow", docs_url=None, redoc_url=None, openapi_url=None)

    @app.get("/")
    async def choose(request: Request) -> Response:
        wanted = request.headers.get("accept-language", "")[:2].lower()
        return RedirectResponse(f"/{wanted if wanted in LANGUAGES else 'en'}/")

    @app.get("/favicon.ico")
    async def favicon() -> Response:
        return Response(status_code=204)

    @app.get("/healthz")
    async def healthz() -> Response:
        return PlainTextResponse("ok")

    for language in LANGUAGES:
        gr.mount_gradio_app(
            app, build(language, models), f"/{language}",
            footer_links=[], run_history=False, enable_monitoring=False, ssr_mode=False, mcp_server=False,
            allowed_paths=[], blocked_paths=[str(ROOT)], max_file_size=0, show_error=False,
            theme=theme(), css_paths=Path(__file__).with_name("style.css"),
        )  # fmt: skip
    app.add_middleware(PageGuard, login, is_local)
    return app


def serve(host: str, port: int, user: str | None, password: str | None, show: bool = False) -> None:
    """Answer until stopped (Ctrl-C, or SIGTERM). Runs that were started here go on. `show` opens a browser.

    Raises:
        InputError: the page could be reached from elsewhere and has no password, or the address is not to be had.
    """
    login = check_login(host, user, password)
    listener = take_address(host, port)
    logging.basicConfig(level=logging.WARNING, stream=sys.stderr, format="%(asctime)s %(message)s")
    logging.getLogger("uvicorn.error").addFilter(_is_fault)
    os.chdir(ROOT)
    os.environ["GRADIO_TEMP_DIR"] = str(ROOT / ".cache" / "gradio")
    models = Models()
    address = f"http://{'127.0.0.1' if host in ('0.0.0.0', '::') else host}:{port}/"
    app = create_app(login, host in LOCAL, models)
    print(f"The page: {address}   (Ctrl-C ends it; a run that was started there goes on)", flush=True)
    if show:
        Timer(1.0, webbrowser.open, [address]).start()
    try:
        answer(app, listener, farewell=3)
    finally:
        models.close()


def _is_fault(record: logging.LogRecord) -> bool:
    """A stream that is still open when the server ends is none."""
    return not (record.exc_info and isinstance(record.exc_info[1], asyncio.CancelledError))
