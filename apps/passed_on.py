"""Commands of `glmflow` whose words argparse reads: what the Tab key offers for them comes from that parser."""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from typer._click.shell_completion import CompletionItem  # typer has no public name for it (0.29)
from typer.core import TyperCommand


class PassedOn(TyperCommand):
    """A command that hands all its words on."""

    def shell_complete(self, ctx: Any, incomplete: str) -> list[CompletionItem]:
        """What the word under way may become; where that is nothing, the shell offers files."""
        known = words_after(parser_of(str(ctx.info_name)), ctx.args, is_option=incomplete.startswith("-"))
        return [CompletionItem(word) for word in known if word.startswith(incomplete)]


def parser_of(command: str) -> argparse.ArgumentParser:
    """The parser behind a command."""
    if command == "check":
        from glm.data.check import check_parser

        return check_parser()
    from flows.arguments import comparison_parser, pipeline_parser

    return comparison_parser() if command == "compare" else pipeline_parser()


def words_after(parser: argparse.ArgumentParser, before: Sequence[str], *, is_option: bool) -> list[str]:
    """The options, or the values of the option that the words `before` end with, or what may stand without one."""
    if is_option:
        return [option for action in parser._actions for option in action.option_strings]
    asked = [action for action in parser._actions if before and before[-1] in action.option_strings]
    [action] = asked or [action for action in parser._actions if not action.option_strings]
    if action.dest == "until":
        from tasks import STEPS

        return list(STEPS)
    if action.dest == "names":
        from glm.config import load_params

        return list(json.loads(Path(load_params().data.dataset_dir, "dataset_info.json").read_text(encoding="utf-8")))
    return list(action.choices or [])
