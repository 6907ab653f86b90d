"""Faults as one line on the page, and what all of its events have in common."""

import inspect
import logging
from collections.abc import Callable
from functools import wraps
from typing import Any

import gradio as gr

from glm.errors import InputError

log = logging.getLogger("glmflow.web")

QUIET: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}  # of an event
SLOW: dict[str, Any] = {"api_visibility": "private", "show_progress": "minimal"}


def told(handler: Callable[..., Any]) -> Callable[..., Any]:
    """`handler`, whose faults the page says in one line. What is no fault of the user goes to the server's log too."""
    if inspect.isgeneratorfunction(handler):

        @wraps(handler)
        def stream(*values: Any) -> Any:
            try:
                yield from handler(*values)
            except Exception as error:
                raise said(error) from None

        return stream

    @wraps(handler)
    def call(*values: Any) -> Any:
        try:
            return handler(*values)
        except Exception as error:
            raise said(error) from None

    return call


def said(error: Exception) -> gr.Error:
    """The error that the page shows for another one."""
    if isinstance(error, gr.Error):
        return error
    if not isinstance(error, InputError):
        log.exception("an event of the page failed")
    lines = str(error).strip().splitlines()
    return gr.Error(lines[0] if lines else type(error).__name__, title="", duration=15, print_exception=False)
