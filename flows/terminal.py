"""Flows that are run from a terminal, by `python -m flows.<flow>` or `glmflow`: what their command lines share."""

import gc
import logging
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from threading import Thread
from typing import NoReturn

import httpx
from prefect.exceptions import PrefectHTTPStatusError
from prefect.settings import PREFECT_API_URL

from flows import ROOT
from flows.errors import FlowError, RefusedError
from flows.interrupt import handle_ctrl_c
from flows.server import WITHOUT_SERVER, prefect_api
from glm.errors import InputError
from tasks.tracking import store_failure


@contextmanager
def in_terminal() -> Iterator[None]:
    """Within the block flows find Prefect's API, Ctrl-C ends them, and the terminal is theirs."""
    handle_ctrl_c(ROOT / ".dvc" / "tmp" / "ctrl-c.log")
    quieten()
    Thread(target=import_ahead, daemon=True).start()
    with prefect_api():
        yield


def import_ahead() -> None:
    """What a run will import in its course, while its server starts: two seconds of work."""
    for name in ("mlflow.store.tracking.sqlalchemy_store", "dvc.repo", "dvc.stage.cache", "matplotlib.pyplot"):
        import_module(name)


def quieten() -> None:
    """Leave the terminal to the progress and the report; Prefect's own log is kept by its server."""
    for name in ("", "prefect._internal"):
        for handler in logging.getLogger(name).handlers:
            handler.setLevel(logging.CRITICAL + 1)
    logging.raiseExceptions = False  # nor what could not be sent to a server that went away


def exit_status(command: Callable[[], int], stopped: str) -> int:
    """Run a command. Its exit status, or 1: something failed, 2: wrong input, 130: Ctrl-C, when `stopped` is said."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # until then, see flows/__init__.py
    try:
        return command()
    except (InputError, RefusedError) as error:
        print(error, file=sys.stderr)
        return 2
    except FlowError as error:
        print(error, file=sys.stderr)
        return 1
    except httpx.TransportError as error:
        start_again(f"the Prefect server went away ({error})")
    except PrefectHTTPStatusError as error:
        said = f"Prefect at {PREFECT_API_URL.value()}: {error.response.status_code} {error.response.reason_phrase}"
        if error.response.is_server_error:
            os.environ[WITHOUT_SERVER] = "1"
            start_again(said)
        password = error.response.status_code == httpx.codes.UNAUTHORIZED
        print(said + ("; its user:password is PREFECT_API_AUTH_STRING" if password else ""), file=sys.stderr)
        return 1
    except Exception as error:
        if not (failure := store_failure(error)):
            raise
        print(failure, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(stopped, file=sys.stderr)
        return 130
    finally:
        gc.freeze()  # the process ends: to look through three thousand modules once more takes a second


def start_again(why: str) -> NoReturn:
    """Run this command once more, in place of this process: its Prefect server has gone away or is broken.

    What is done is in DVC's cache, so the new one goes on from there, with a server of its own if it finds none. In
    this process Prefect's threads would try for minutes to send what they hold to the one that is gone.
    """
    print(f"warning: {why}; going on without it", file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
