"""Sending the champion to the Hugging Face hub, where `export.push_to_hub` names a model there."""

from flows.errors import HubError
from glm.config import Params
from glm.errors import InputError


def check_hub(params: Params) -> None:
    """Ask the hub who we are, if anything is to be sent there.

    Raises:
        InputError: no token, a wrong one, or no way to the hub.
    """
    from glm.export.hub import check_access

    if params.export.push_to_hub:
        check_access(params.export.push_to_hub)


def send_champion(version: str, reason: str, params: Params) -> None:
    """Send the export that is registered as `version`, just made the champion; nothing without `export.push_to_hub`.

    Raises:
        HubError: it is the champion, but the hub has not got it; the message has the command that sends it.
    """
    from mlflow.artifacts import download_artifacts

    from glm.export.hub import push
    from tasks.logged_models import logged_folders

    repo_id = params.export.push_to_hub
    if not repo_id:
        return
    name = f"{params.promote.model_name}/{version}"
    try:
        folders, _ = logged_folders(download_artifacts(f"models:/{name}"))
        push(folders[-1], repo_id, params.export.private, message=f"{name}: {reason}")
    except InputError as error:
        command = f"glmflow export models:/{name} FOLDER --push-to-hub {repo_id}"
        raise HubError(f"models:/{name} is the champion now, but is not on the hub: {error}; `{command}`") from error
