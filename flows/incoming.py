"""New data for a retraining: brought into its workspace, never into the checkout.

imported sources       `dvc import`, `dvc import-url`: `dvc update` asks whether the source has moved
tracked files          `dvc pull` what the cache does not have
files of the checkout  that a dataset of params.yaml names and neither git nor DVC knows, such as data/feedback/
hub datasets           an entry of dataset_info.json without `revision` gets the newest commit of the hub, so that
                       the run says which one it had
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

from ruamel.yaml import YAML

from flows import ROOT
from flows.workspace import dvc
from glm.config import Data
from glm.data.registry import read_registry
from glm.data.rows import USES
from glm.data.sources import hub_repository
from glm.errors import InputError
from glm.files import write_json


def bring_in(root: Path, data: Data, known_revisions: Callable[[], dict[str, str]]) -> list[str]:
    """Bring the newest data into the workspace `root`; say in a line each what was done.

    Args:
        known_revisions: asked for those of hub datasets at the last retraining.

    Raises:
        InputError: an unpinned hub dataset was never seen, and the hub does not answer.
        CommandError: DVC cannot reach a source or the remote.
    """
    folder = root / data.dataset_dir
    said = tracked(root, folder)
    said += untracked(folder, ROOT / data.dataset_dir, data)
    said += pin_revisions(folder, data, known_revisions)
    return said


def tracked(root: Path, folder: Path) -> list[str]:
    """Bring what the .dvc files below `folder` name, imports at their sources' present state."""
    pointers = sorted(folder.rglob("*.dvc"))
    if not pointers:
        return []
    names = [str(path.relative_to(root)) for path in pointers]
    if dvc(root, "remote", "list").strip():
        dvc(root, "pull", "--allow-missing", *names)
    else:
        dvc(root, "checkout", "--allow-missing", "--force", *names)
    yaml = YAML(typ="safe", pure=True)
    imported = [name for name, path in zip(names, pointers, strict=True) if "deps" in yaml.load(path.read_text())]
    before = [(root / name).read_text() for name in imported]
    if imported:
        dvc(root, "update", *imported)
    moved = [name for name, text in zip(imported, before, strict=True) if (root / name).read_text() != text]
    return [f"{name}: its source has changed" for name in moved]


def pin_revisions(folder: Path, data: Data, known_revisions: Callable[[], dict[str, str]]) -> list[str]:
    """Write the newest commit of each used hub dataset that has no `revision` into the workspace's registry."""
    from huggingface_hub import HfApi

    free = {name: entry for name, entry in read_registry(folder, used(data)).items() if not entry.revision}
    unpinned = {name: found for name, entry in free.items() if (found := hub_repository(name, entry, folder))}
    if not unpinned:
        return []
    known = known_revisions()
    content = json.loads((folder / "dataset_info.json").read_text(encoding="utf-8"))
    said = []
    for name, repository in unpinned.items():
        try:
            revision = str(HfApi().dataset_info(repository, timeout=30).sha)
        except Exception as error:  # the hub's and the network's faults have many classes and no common one
            if name not in known:
                raise InputError(
                    f"dataset {name!r}: the hub cannot be asked for the newest commit of {repository} ({error}); "
                    "give its `revision` in dataset_info.json"
                ) from None
            revision = known[name]
            said.append(f"{name}: the hub does not answer; revision {revision} as last time")
        content[name]["revision"] = revision
        if known.get(name) not in (None, revision):
            said.append(f"{name}: the hub has a new revision, {revision}")
    write_json(folder / "dataset_info.json", content)
    return said


def untracked(folder: Path, checkout: Path, data: Data) -> list[str]:
    """Copy the local sources of used datasets that the workspace does not have from the checkout."""
    copied = []
    for entry in read_registry(folder, used(data)).values():
        file_name = entry.file_name or entry.script_url
        source = checkout / (file_name or "")
        files = [source] if source.is_file() else sorted(source.rglob("*")) if file_name and source.is_dir() else []
        for file in files:
            target = folder / file.relative_to(checkout)
            if file.is_file() and not file.name.startswith(".") and not target.exists():
                target.parent.mkdir(parents=True, exist_ok=True)
                snapshot(file, target)
                copied.append(str(file.relative_to(checkout)))
    return [f"{name}: taken from the checkout" for name in dict.fromkeys(copied)]


def snapshot(source: Path, target: Path) -> None:
    """Copy a file; of one whose rows are lines, without a last line that is still being written."""
    if source.suffix != ".jsonl":
        shutil.copyfile(source, target)
        return
    content = source.read_bytes()
    target.write_bytes(content[: content.rfind(b"\n") + 1])


def used(data: Data) -> list[str]:
    """The datasets that params.yaml names, each once."""
    return list(dict.fromkeys(name for use in USES for name in getattr(data, use)))
