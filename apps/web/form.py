"""The parameters as components of the page, in tabs; only the chosen algorithm's section is shown."""

from typing import Any, get_args

import gradio as gr

from apps.web.fields import Filled, Parameter, as_text, current, parameters
from apps.web.texts import Texts
from glm.config import Algorithm

ALGORITHMS = get_args(Algorithm)
TABS = {  # and their sections of params.yaml
    "model": ("model",),
    "data": ("data",),
    "sft": ("sft",),
    "reward": ("reward", "reward_model"),
    "policy": ALGORITHMS,
    "more": ("evaluate", "export", "promote", "tracking", "launch", "rollout"),
}


def component(one: Parameter, label: str, text: Texts, name: str) -> gr.Textbox | gr.Dropdown | gr.Checkbox:
    """A parameter's component: a check box, a list of choices, or a text, with its description and bounds."""
    common: dict[str, Any] = {
        "label": label,
        "info": "; ".join(part for part in (text.describe(one.description), one.bounds) if part) or None,
        "elem_id": name,
        "interactive": True,
        "min_width": 200,
    }
    if one.is_box:
        return gr.Checkbox(**common)
    return gr.Dropdown(list(one.choices), **common) if one.choices else gr.Textbox("", max_lines=1, **common)


class ParameterForm:
    """The components by the name of their parameter, and the columns of the algorithms."""

    def __init__(self, text: Texts) -> None:
        """To be called within gr.Blocks."""
        self.text = text
        self.components: dict[str, gr.Textbox | gr.Dropdown | gr.Checkbox] = {}
        self.columns: dict[str, gr.Column] = {}
        with gr.Row():
            self._add(parameters()[0])
            self._add(parameters()[1])
        with gr.Tabs(elem_classes="sections"):
            for tab, sections in TABS.items():
                with gr.Tab(text(f"form.{tab}"), render_children=True):
                    for section in sections:
                        self._section(section, is_shown=tab != "policy" or section == "ppo")

    def _section(self, section: str, is_shown: bool) -> None:
        with gr.Column(visible=is_shown) as column, gr.Row(elem_classes="fields"):
            for one in parameters():
                if one.section == section:
                    self._add(one)
        if section in ALGORITHMS:
            self.columns[section] = column

    def _add(self, one: Parameter) -> None:
        label = one.name if one.section in TABS["more"] or one.section == "reward_model" else one.name.partition(".")[2]
        self.components[one.name] = component(one, label or one.name, self.text, "p-" + one.name.replace(".", "-"))

    def values(self) -> list[Filled]:
        """What params.yaml says now, for the components in their order."""
        now = current()
        return [now[one.name] == "true" if one.is_box else now[one.name] for one in self._in_order()]

    def filled(self, values: tuple[Filled, ...]) -> dict[str, Filled]:
        """The components' values by name."""
        return dict(zip(self.components, values, strict=True))

    def faults(self, faults: dict[str, str]) -> list[dict[str, object]]:
        """Each component's verdict, as gradio shows it in place."""
        return [gr.validate(name not in faults, faults.get(name, "")) for name in self.components]

    def _in_order(self) -> list[Parameter]:
        known = {one.name: one for one in parameters()}
        return [known[name] for name in self.components]


def changes_html(before: dict[str, str], overrides: dict[str, object], text: Texts) -> str:
    """What differs from params.yaml."""
    from glm.html import table

    if not overrides:
        return f"<p class='note'>{text('train.no_changes')}</p>"
    rows = [[name, before[name] or "–", as_text(value) or "–"] for name, value in overrides.items()]
    return f"<div class='changes'>{table([text('train.parameter'), 'params.yaml', text('train.now')], rows)}</div>"
