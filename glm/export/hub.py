"""Sending an export to the Hugging Face hub."""

from pathlib import Path

from glm.errors import InputError
from glm.models.lineage import FILE_NAME


def check_access(repo_id: str) -> None:
    """Ask the hub who we are, before hours are spent on what could not be sent.

    Raises:
        InputError: no token, a wrong one, or no way to the hub.
    """
    from huggingface_hub import HfApi

    try:
        HfApi().whoami()
    except Exception as error:  # the client raises several kinds: no token, refused, no network
        why = _first_line(error)
        raise InputError(f"push_to_hub {repo_id}: the hub does not know you (HF_TOKEN, HF_ENDPOINT): {why}") from error


def push(folder: str | Path, repo_id: str, private: bool, message: str = "export") -> str:
    """Make the repository `repo_id` if it is not there, and commit the files of `folder` to it. Returns its URL.

    The endpoint and the token are those of huggingface_hub (HF_ENDPOINT, HF_TOKEN). What an adapter stands on by paths
    of this machine is left out: its adapter_config.json names the base.

    Raises:
        InputError: the hub refuses, or cannot be reached; `folder` stays.
    """
    from huggingface_hub import HfApi

    api = HfApi()
    try:
        api.create_repo(repo_id, private=private, exist_ok=True)
        done = api.upload_folder(
            repo_id=repo_id, folder_path=folder, ignore_patterns=[FILE_NAME], commit_message=message
        )
    except Exception as error:  # of HTTP, of the network, of the hub's own rules
        raise InputError(f"push_to_hub {repo_id}: not sent, {folder} is complete: {_first_line(error)}") from error
    return str(done.commit_url)


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
