"""The web page's form, which is the schema's, and the rule that no field leads out of the project."""

import re
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("gradio", reason="the extra `web` is not installed")

from apps.web.descriptions import CHINESE
from apps.web.export import words_of
from apps.web.fields import Form, command, current, parameters, read_form
from apps.web.form import TABS
from apps.web.loaded import Models
from apps.web.paths import check_path, check_paths
from apps.web.run import check_login
from apps.web.texts import LANGUAGES, TEXTS
from flows import ROOT
from flows.background import find
from glm.errors import InputError


def filled(**changes: Any) -> Form:
    return read_form(current() | {name.replace("__", "."): value for name, value in changes.items()})


def test_a_form_that_says_what_params_yaml_says_is_plain_glmflow_run() -> None:
    form = filled()
    assert (form.overrides, form.faults) == ({}, {}) and command(form.words()) == "glmflow run"
    assert filled(sft__learning_rate=str(float(current()["sft.learning_rate"])) + "0").overrides == {}


def test_every_parameter_has_its_place_in_the_form() -> None:
    places = [section for sections in TABS.values() for section in sections]
    assert {one.section for one in parameters()} == {"", *places}  # seed and algorithm, of no section, stand above


def test_differences_and_command_say_the_same() -> None:
    form = filled(
        sft__lora_rank="4", sft__packing=False, data__sft="reviews_sft, self_cognition", ppo__kl_target="6.5",
        data__source_prefix="你是客服: 请回答", model__revision="", algorithm="dpo", data__kto="{feedback: 0.5}",
    )  # fmt: skip
    assert not form.faults
    assert form.overrides == {
        "algorithm": "dpo",
        "data.sft": ["reviews_sft", "self_cognition"],
        "data.kto": {"feedback": 0.5},
        "data.source_prefix": "你是客服: 请回答",
        "sft.packing": False,
        "sft.lora_rank": 4,
        "ppo.kl_target": 6.5,
    }
    from flows.workspace import parse_overrides

    words = form.words("sft")
    assert words[-2:] == ["--until", "sft"]
    assert parse_overrides(words[1:-2:2]) == form.overrides  # as the command line reads them


def test_faults_stand_at_their_fields() -> None:
    faults = filled(sft__lora_rank="0", sft__learning_rate="fast", ppo__batch_size="33", sft__max_steps="[1").faults
    assert set(faults) == {"sft.lora_rank", "sft.learning_rate", "ppo.batch_size", "sft.max_steps"}
    assert "≥" not in faults["sft.lora_rank"] and "greater than or equal to 1" in faults["sft.lora_rank"]
    [(name, message)] = filled(sft__method="full", model__quantization="nf4").faults.items()
    assert name in ("sft.method", "model.quantization") and "no gradient can move" in message


@pytest.mark.parametrize("text", ["[", "&a [*a]", "2026-11-24", "!!set {a}", "{? [1] : 2}", "1e400", "nan", "x" * 9999])
def test_whatever_is_typed_is_a_fault_of_a_line(text: str) -> None:
    typed = [one.name for one in parameters() if not (one.choices or one.is_text or one.is_list)]
    faults = read_form(current() | dict.fromkeys(typed, text)).faults
    assert set(faults) == set(typed)
    assert all(message and "\n" not in message and len(message) < 300 for message in faults.values())


@pytest.mark.parametrize(
    "path", ["../x", "data/../../x", "/etc/passwd", "~/x", "~root", "file:///etc/passwd", "models/..", "a\0b", "x:../y"]
)
def test_no_field_takes_a_path_that_leads_out(path: str) -> None:
    typed = [one.name for one in parameters() if not one.choices and one.name != "data.source_prefix"]
    for text in (path, f"models/sft, {path}"):
        faults = read_form(current() | dict.fromkeys(typed, text)).faults
        assert set(typed) <= set(faults)
    options = {one: "" for one in parameters() if one.section == "export"}
    for refuse in (
        lambda: Models().get("model", path),
        lambda: words_of(path, "out", options),
        lambda: words_of("models/sft", path, options),
        lambda: find(path),
        lambda: check_paths("field", {"a": [path]}),
    ):
        with pytest.raises(InputError) as told:
            refuse()
        assert "\n" not in str(told.value)


def test_what_is_inside_or_no_path_passes(tmp_path: Path) -> None:
    for name in ("models/export", str(ROOT / "models"), "zai-org/chatglm2-6b@abc", "models:/rlhf-policy@champion"):
        assert check_path("model", name) == name
    link = ROOT / ".cache" / "leads-out"
    link.parent.mkdir(exist_ok=True)
    link.unlink(missing_ok=True)
    link.symlink_to(tmp_path)
    try:
        with pytest.raises(InputError, match="outside"):
            check_path("model", ".cache/leads-out/x")
    finally:
        link.unlink()


def test_an_export_goes_below_exports() -> None:
    options = {one: False if one.is_box else "" for one in parameters() if one.section == "export"}
    words = words_of("models/sft", "mine/v1", options)
    assert words[:3] == ["export", "models/sft", "exports/mine/v1"]
    for model, folder in (("--help", "a"), ("models/sft", "."), ("models/sft", "./"), ("", "a"), ("models/sft", " ")):
        with pytest.raises(InputError):
            words_of(model, folder, options)


def test_beyond_this_machine_a_password_is_needed() -> None:
    assert check_login("127.0.0.1", None, None) is None
    assert check_login("0.0.0.0", "ann", "secret") == ("ann", "secret")
    for given in (("0.0.0.0", None, None), ("127.0.0.1", "ann", None), ("0.0.0.0", None, "secret")):
        with pytest.raises(InputError, match="password"):
            check_login(*given)


def test_every_text_is_there_in_each_language() -> None:
    used = set()
    for module in Path(ROOT, "apps", "web").glob("*.py"):
        used |= set(re.findall(r"""\btext\(["']([a-z_.]+)["']""", module.read_text(encoding="utf-8")))
    assert used and used <= set(TEXTS)
    for texts in TEXTS.values():
        assert len(texts) == len(LANGUAGES) and all(texts)
        assert len({tuple(sorted(re.findall(r"{(\w+)", text))) for text in texts}) == 1
    assert all(re.search(r"[\u4e00-\u9fff]", chinese) for chinese in CHINESE.values())
