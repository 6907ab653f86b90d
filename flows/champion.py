"""Who is the champion: promoting by hand or by the gate, going back, and the record of both.

Every move of the alias `champion` is an event, kept as a tag of the registered model (`champion.0001`, JSON), so that
the record outlives versions and can be read in MLflow's pages. A move and its record are one transaction: if anything
fails, the alias is back where it was. The version itself is told first, so that a kill between alias and event loses
nothing either: `history` finds the event there.
"""

import getpass
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from flows.publish import check_hub, send_champion
from flows.registry import alias_version, moved_alias, smoke_test
from glm.config import Params
from glm.errors import InputError
from tasks.registered import find_version, version_of_run
from tasks.tracking import open_store, store_lock, store_uri

if TYPE_CHECKING:
    from mlflow import MlflowClient

CHAMPION = "champion"  # the alias of the one to serve
EVENT = "champion."  # what the events' tags begin with
TOLD = {"promote": "promoted", "rollback": "rolled_back_to"}  # what a version's own tags of a move begin with


@dataclass(frozen=True)
class Move:
    """One move of the alias `champion`."""

    action: str  # promote or rollback
    version: str
    before: str | None
    reason: str
    by: str
    at: str


def promote(version: str, reason: str, params: Params, by: str | None = None) -> tuple[str, str | None]:
    """Let the alias `champion` point to a version, once it has answered a question; record why, when and after whom.

    `version` is a number, or an alias such as "challenger". Then it goes to the hub, if `export.push_to_hub` is set.
    Returns the version's number and that of the champion before; if the two are equal, nothing was done.

    Raises:
        InputError: there is no such model or version, no reason, no way to the hub, or another champion than at the
            beginning; the alias is as before.
        SmokeTestError: the model does not answer; the alias is as before.
        HubError: it is the champion, but was not sent.
    """
    check_reason(reason, "promoted")
    client, _ = open_store(params.tracking.experiment)
    name = params.promote.model_name
    uri = f"models:/{name}/{version}" if version.isdigit() else f"models:/{name}@{version}"
    number = str(find_version(client, uri).version)
    before = alias_version(client, name, CHAMPION)
    if before == number:
        return number, number
    check_hub(params)
    smoke_test(f"models:/{name}/{number}")
    move_champion(client, name, number, before, "promote", reason, by)
    send_champion(number, reason, params)
    return number, before


def promote_run(run_id: str, reason: str, params: Params) -> tuple[str, str | None]:
    """`promote` the version that a run made: a pipeline's run, or that of its export step."""
    client, _ = open_store(params.tracking.experiment)
    return promote(str(version_of_run(client, params.promote.model_name, run_id).version), reason, params)


def rollback(reason: str, params: Params, steps: int = 1) -> tuple[str, str | None]:
    """Let the alias `champion` point to the champion before the present one, or `steps` before; once it has answered.

    Asked twice, it goes two back. Versions that were deleted are passed over. Returns the champion now and before.

    Raises:
        InputError: nobody was champion before, no reason is given, or there is another champion than at the beginning.
        SmokeTestError: the earlier model does not answer any more; the alias is as before.
        HubError: it is the champion again, but was not sent to the hub.
    """
    check_reason(reason, "taken back")
    client, _ = open_store(params.tracking.experiment)
    name = params.promote.model_name
    existing = {str(version.version) for version in client.search_model_versions(f"name = '{name}'")}
    if not existing:
        raise InputError(f"{name}: no model is registered under this name (promote.model_name)")
    champion = alias_version(client, name, CHAMPION)
    earlier = [version for version in reign(history(client, name), champion) if version in existing]
    if champion and earlier[-1:] == [champion]:
        earlier.pop()
    if steps > len(earlier):
        raise InputError(
            f"{name}: cannot go {steps} back from version {champion or 'none'}: champions before it are "
            f"{', '.join(earlier) or 'none'}; `glmflow promote` makes any version the champion"
        )
    number = earlier[-steps]
    smoke_test(f"models:/{name}/{number}")
    move_champion(client, name, number, champion, "rollback", reason)
    send_champion(number, reason, params)
    return number, champion


def check_reason(reason: str, what: str) -> None:
    """Raise an InputError for an empty reason."""
    if not reason.strip():
        raise InputError(f"reason: say in a few words why the version is {what}; it is kept with the version")


def move_champion(
    client: "MlflowClient", name: str, version: str, before: str | None, action: str, reason: str, by: str | None = None
) -> None:
    """Move the alias from the version `before` and record the move, both or neither.

    Raises:
        InputError: somebody else has moved it meanwhile; who decided this saw another champion.
    """
    with store_lock(store_uri()):  # two at once take turns
        found = alias_version(client, name, CHAMPION)
        if found != before:
            raise InputError(
                f"{name}: meanwhile the champion has become version {found or 'none'} (it was {before or 'none'}): "
                "look at `glmflow champions`, then decide again"
            )
        now = datetime.now(UTC).isoformat(timespec="seconds")
        move = Move(action, version, before, reason, by or getpass.getuser(), now)
        past = history(client, name)
        words = {"reason": reason, "by": move.by, "champion_before": before or "", "at": now}  # `at` says: complete
        for word, value in words.items():
            client.set_model_version_tag(name, version, f"{TOLD[action]}.{word}", value)
        with moved_alias(client, name, CHAMPION, version):
            for number, event in list(enumerate([*past, move], start=1))[-2:]:  # the last one may have been cut off
                text = json.dumps(asdict(event), ensure_ascii=False)
                client.set_registered_model_tag(name, f"{EVENT}{number:04d}", text)


def history(client: "MlflowClient", name: str) -> list[Move]:
    """Every move of the alias, oldest first."""
    tags = client.get_registered_model(name).tags
    recorded = [Move(**json.loads(tags[key])) for key in sorted(tags) if key.startswith(EVENT)]
    return recorded + cut_off(client, name, recorded[-1].at if recorded else "")


def cut_off(client: "MlflowClient", name: str, last: str) -> list[Move]:
    """The move after the time `last` that a kill kept from becoming an event: the champion itself knows of it."""
    champion = alias_version(client, name, CHAMPION)
    tags = client.get_model_version(name, champion).tags if champion else {}
    return [
        Move(action, champion, tags[f"{told}.champion_before"] or None, tags[f"{told}.reason"], tags[f"{told}.by"], at)
        for action, told in TOLD.items()
        if champion and (at := tags.get(f"{told}.at", "")) > last
    ]


@dataclass(frozen=True)
class Version:
    """A registered version, and what the gate and people said of it."""

    number: str
    aliases: list[str]
    registered: str
    gate: str  # passed, refused, awaiting approval; empty: it was not asked
    why: str  # it was refused or promoted


def versions(params: Params) -> list[Version]:
    """The versions of the model that params.yaml names, the newest first; none if it has not been registered."""
    client, _ = open_store(params.tracking.experiment)
    name = params.promote.model_name
    if not client.search_registered_models(f"name = '{name}'"):
        return []
    aliases: dict[str, list[str]] = {}
    for alias, number in client.get_registered_model(name).aliases.items():
        aliases.setdefault(str(number), []).append(alias)
    return [
        Version(
            str(version.version),
            aliases.get(str(version.version), []),
            datetime.fromtimestamp(version.creation_timestamp / 1000, UTC).strftime("%Y-%m-%d %H:%M"),
            version.tags.get("gate.decision", ""),
            version.tags.get("gate.refused_by") or version.tags.get("promoted.reason", ""),
        )
        for version in sorted(client.search_model_versions(f"name = '{name}'"), key=lambda one: -int(one.version))
    ]


def moves(params: Params) -> list[Move]:
    """The moves of the model that params.yaml names.

    Raises:
        InputError: there is no such model.
    """
    client, _ = open_store(params.tracking.experiment)
    name = params.promote.model_name
    if not client.search_registered_models(f"name = '{name}'"):
        raise InputError(f"{name}: no model is registered under this name (promote.model_name)")
    return history(client, name)


def reign(past: Sequence[Move], champion: str | None) -> list[str]:
    """The versions to which one can go back, oldest first, the present champion last.

    A rollback forgets those after the version that it went back to. An alias that was moved by other means counts as
    promoted.
    """
    line: list[str] = []
    for move in past:
        if move.before and line[-1:] != [move.before]:
            line.append(move.before)
        if move.action == "rollback" and move.version in line:
            del line[len(line) - line[::-1].index(move.version) :]
        elif line[-1:] != [move.version]:
            line.append(move.version)
    if champion and line[-1:] != [champion]:
        line.append(champion)
    return line
