"""`vllm serve` as a child of this server: started on a model that it can read, waited for, ended with us.

Checked against the documentation of vLLM 0.28 (`vllm serve` and its options, VLLM_API_KEY, /health), not run with it.
"""

import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx

from apps.models import Resolved
from glm.errors import InputError
from tasks.launch import follow_launcher

START = 1800.0  # seconds that loading and compiling may take
GOODBYE = 30.0  # seconds that it has to end, before it is killed
STOPPED: set[subprocess.Popen[bytes]] = set()  # children whose end is ours
AUTHORS_1 = ("inner_hidden_size", "position_encoding_2d")  # in the configs of ChatGLM-6B


def find_vllm() -> str:
    """The program. Raises InputError if there is none."""
    program = shutil.which("vllm")
    if program is None:
        raise InputError(
            "engine vllm: there is no program `vllm` in PATH. It pins a torch of its own, so install it into an "
            "environment of its own (python -m venv ~/vllm && ~/vllm/bin/pip install vllm) and put its bin folder "
            "into PATH; or give --engine-url to one that runs already"
        )
    return program


@contextmanager
def vllm_server(
    program: str, folder: Path, *, max_batch: int, max_length: int | None, dtype: str | None
) -> Iterator[tuple[str, str]]:
    """Run vLLM on the model in `folder` while the context lasts: (address, API key). If it ends before, so do we.

    Raises:
        InputError: it has not come up.
    """
    port, key = free_port(), secrets.token_hex(16)
    command = [program, "serve", str(folder), "--host", "127.0.0.1", "--port", str(port)]
    command += ["--served-model-name", "model", "--max-num-seqs", str(max_batch), "--generation-config", "vllm"]
    command += ["--max-model-len", str(max_length)] if max_length else []
    command += ["--dtype", dtype] if dtype else []
    child = subprocess.Popen(
        command,
        env=os.environ | {"VLLM_API_KEY": key, "VLLM_NO_USAGE_STATS": "1"},
        stdout=sys.stderr.fileno(),
        start_new_session=True,  # Ctrl-C is for us
        preexec_fn=follow_launcher,
    )
    try:
        wait_until_healthy(child, f"http://127.0.0.1:{port}")
        threading.Thread(target=end_with, args=[child], daemon=True).start()
        yield f"http://127.0.0.1:{port}", key
    finally:
        stop(child)


def readable_folder(model: Resolved, scratch: Path, dtype: str | None) -> Path:
    """A folder that vLLM reads by its own classes: the model's own, or a merged export of it in `scratch`.

    Raises:
        InputError: vLLM has no class for it.
    """
    from apps.export import read_options, stored_dtype
    from glm.export.facts import Facts
    from glm.export.writing import export
    from glm.models.checkpoint import local_folder, read_config
    from glm.models.lineage import Lineage
    from glm.models.methods import method_of
    from glm.models.prefix import BESIDE

    folder = local_folder(model.base, model.revision)
    config = read_config(folder)
    if any(name in config for name in AUTHORS_1):
        raise InputError(f"engine vllm: {model.base}: vLLM knows no ChatGLM-6B (ChatGLM2, ChatGLM3 and GLM-4 it does)")
    if (folder / BESIDE).is_dir() or any(method_of(Path(adapter)) == "p_tuning" for adapter in model.adapters):
        raise InputError(f"engine vllm: {model.describe()}: vLLM knows no P-Tuning v2 prefixes")
    if not model.adapters and model.quantization == "none" and "auto_map" not in config:
        return folder
    source = Lineage(model.base, model.revision, quantization=model.quantization, adapters=model.adapters)
    options = read_options({"dtype": dtype or stored_dtype(source)})
    return export(source, scratch / "model", options, Facts()).folder


def wait_until_healthy(child: subprocess.Popen[bytes], url: str) -> None:
    """Wait for /health. Raises InputError if the child ends before, or does not come up."""
    deadline = time.monotonic() + START
    while time.monotonic() < deadline:
        if child.poll() is not None:
            raise InputError(f"engine vllm: it has ended with status {child.returncode}; its last words are above")
        try:
            if httpx.get(f"{url}/health", trust_env=False).status_code == 200:
                return
        except httpx.HTTPError:
            pass
        time.sleep(0.5)
    raise InputError(f"engine vllm: not ready after {START:.0f} s")


def end_with(child: subprocess.Popen[bytes]) -> None:
    """End this server when the engine has ended by itself: whoever watches over it starts both again."""
    status = child.wait()
    if child not in STOPPED:
        print(f"engine vllm: it has ended with status {status}, and so does this server", file=sys.stderr)
        os.kill(os.getpid(), signal.SIGTERM)


def stop(child: subprocess.Popen[bytes]) -> None:
    """End the child; its own children are of its group."""
    STOPPED.add(child)
    child.terminate()
    try:
        child.wait(GOODBYE)
    except subprocess.TimeoutExpired:
        os.killpg(child.pid, signal.SIGKILL)
        child.wait()


def free_port() -> int:
    """A port of this machine that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
