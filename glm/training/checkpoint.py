"""Checkpoints from which a killed training goes on as if nothing had happened.

    checkpoints = Checkpoints(folder)
    if (found := checkpoints.latest()):
        step, state = found
    ...
    checkpoints.save(step, {"policy": …, "optimizer": optimizer.state_dict(), "rng": rng_state()})
    ...
    checkpoints.clear()

A state is what torch.load reads back with `weights_only=True`: tensors, numbers, strings, lists, tuples and dicts.
"""

import os
import random
import shutil
import tempfile
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch

from glm.files import file_hash
from glm.training.distributed import rank


class Checkpoints:
    """The folders step-N below `folder`, of which the newest `keep` stay. Of several processes the first one writes."""

    def __init__(self, folder: str | Path, keep: int = 2) -> None:
        self.folder = Path(folder)
        self.keep = keep

    def save(self, step: int, state: dict[str, Any]) -> None:
        """Write a checkpoint that is either whole or not there, then drop the oldest ones."""
        if rank() > 0:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        for left_behind in self.folder.glob(".step-*"):  # by a process that was killed while it wrote
            shutil.rmtree(left_behind)
        temporary = Path(tempfile.mkdtemp(dir=self.folder, prefix=f".step-{step}."))
        torch.save(state, temporary / "state.pt")
        (temporary / "sha256").write_text(file_hash(temporary / "state.pt", "sha256"), encoding="utf-8")
        for path in (temporary / "state.pt", temporary / "sha256", temporary):
            _sync(path)
        target = self.folder / f"step-{step}"
        shutil.rmtree(target, ignore_errors=True)
        os.replace(temporary, target)
        _sync(self.folder)
        for _, old in self._all()[self.keep :]:
            shutil.rmtree(old)

    def latest(self) -> tuple[int, dict[str, Any]] | None:
        """(step, state) of the newest whole checkpoint, on the CPU; a damaged one is passed over with a warning."""
        for step, path in self._all():
            try:
                if file_hash(path / "state.pt", "sha256") != (path / "sha256").read_text(encoding="utf-8"):
                    raise ValueError("state.pt is not what was written")
                return step, torch.load(path / "state.pt", map_location="cpu", weights_only=True)
            except (OSError, ValueError) as error:
                warnings.warn(f"{path}: a damaged checkpoint is passed over: {error}", stacklevel=2)
        return None

    def clear(self) -> None:
        """Remove all of them."""
        if rank() == 0:
            shutil.rmtree(self.folder, ignore_errors=True)

    def _all(self) -> list[tuple[int, Path]]:
        """Newest first."""
        found = [(int(path.name.removeprefix("step-")), path) for path in self.folder.glob("step-*")]
        return sorted(found, reverse=True)


def rng_state() -> dict[str, Any]:
    """The state of every random number generator that training draws from, on the CPU and on this process's GPU."""
    numpy = np.random.get_state(legacy=False)
    return {
        "python": random.getstate(),
        "numpy": {**numpy, "state": {**numpy["state"], "key": numpy["state"]["key"].tolist()}},
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
    }


def set_rng_state(state: dict[str, Any]) -> None:
    """Put the generators back to where `rng_state` found them."""
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None:
        torch.cuda.set_rng_state(state["cuda"])


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
