"""The README.md of an export: a model card in the hub's format, the same bytes for the same model and facts."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import EvalResult, ModelCardData
from ruamel.yaml import YAML
from ruamel.yaml.compat import StringIO

from glm.config import Export
from glm.export.facts import Facts
from glm.models.lineage import Lineage, folder_hash
from glm.models.methods import method_of

if TYPE_CHECKING:
    from glm.export.writing import Exported

COUNTS = ("read", "kept", "train", "dev", "test")
TITLES = {
    "loss": "loss, nats a token",
    "bleu-4": "BLEU-4",
    "rouge-1": "ROUGE-1",
    "rouge-2": "ROUGE-2",
    "rouge-l": "ROUGE-L",
    "reward": "reward",
    "judge": "reward by the judge",
    "win_rate": "prompts won against SFT",
    "kl": "KL to SFT, nats an answer",
}
WHOLE = """from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{place}")
tokenizer = AutoTokenizer.from_pretrained("{place}")"""
OURS = """from glm.models import load_model, load_tokenizer  # of the project that made this folder

model = load_model("{place}")
tokenizer = load_tokenizer("{place}")"""
THEIRS = """# with the Python files of ChatGLM's authors, and a transformers as old as they are
from transformers import AutoModel

model = AutoModel.from_pretrained("{place}", trust_remote_code=True)"""


def model_card(
    name: str, source: Lineage, hub_id: str | None, options: Export, facts: Facts, exported: "Exported"
) -> str:
    """README.md: the hub's header, then what the model is, how to load it, what made it, and how it was checked."""
    place, path = options.push_to_hub or name, facts.base.get("path") or ""
    hub_id = hub_id or (path if "/" in path else None)
    sections = [
        f"# {name}",
        _what(source, hub_id, options, facts, exported),
        "## Load it",
        *_load(place, source, options, exported),
        "## Made from",
        _table(["part", "what", "content"], _parts(source, facts)),
    ]
    if facts.sources:
        sections += ["## Data", _table(["dataset", "use", *COUNTS, "sha256"], _data(facts)), DATA_NOTE]
    if facts.metrics:
        sections += ["## Results on the test split", _results(facts)]
        sections += [] if options.quantization == "none" else ["They were measured before the weights were rounded."]
    sections += ["## Checked", _checked(options, exported)]
    if facts.parameters:
        sections += ["## Parameters", f"```yaml\n{_yaml(facts.parameters)}```"]
    if facts.origin:
        sections += ["## Recorded", _table(["", ""], [[what, value] for what, value in facts.origin.items()])]
    sections += ["## Licence", _licence(hub_id)]
    return f"---\n{_header(name, hub_id, options, facts)}\n---\n\n" + "\n\n".join(sections) + "\n"


DATA_NOTE = "`read` are rows of the files, `kept` those that could serve; train, dev and test are the splits of these."


def _header(name: str, hub_id: str | None, options: Export, facts: Facts) -> str:
    datasets = [source["entry"].get("hf_hub_url") for source in facts.sources.values()]
    last = _stages(facts)[-1] if facts.metrics else ""
    results = [
        EvalResult(
            task_type="text-generation",
            dataset_type="held-out",
            dataset_name="test split of the training data",
            metric_type=key,
            metric_name=title,
            metric_value=_rounded(facts.metrics[f"{last}.{key}"]),
        )
        for key, title in TITLES.items()
        if f"{last}.{key}" in facts.metrics and options.quantization == "none"
    ]
    relation = "adapter" if options.what == "adapter" else "quantized" if options.quantization != "none" else "finetune"
    data = ModelCardData(
        model_name=name,
        language=["zh", "en"],
        license="other",
        library_name="peft" if options.what == "adapter" else "transformers",
        pipeline_tag="text-generation",
        base_model=hub_id,
        datasets=sorted(set(filter(None, datasets))) or None,
        tags=sorted({"chatglm", *filter(None, [facts.algorithm, options.quantization.replace("none", "")])}),
        eval_results=results or None,
    )
    if hub_id:
        data["base_model_relation"] = relation
    return str(data.to_yaml())


def _what(source: Lineage, hub_id: str | None, options: Export, facts: Facts, exported: "Exported") -> str:
    base = hub_id or facts.base.get("path") or Path(source.base).name
    how = f", tuned by {facts.algorithm.upper()}" if facts.algorithm else ""
    kind = {"merged": "The whole model", "adapter": "The adapter alone"}[options.what]
    form = "" if options.quantization == "none" else f", its weights rounded to {options.quantization}"
    count = f"{exported.parameters:,} parameters"
    return f"{kind} of `{base}`{how}{form}: {count}, {options.dtype if options.what == 'merged' else 'as trained'}."


def _load(place: str, source: Lineage, options: Export, exported: "Exported") -> list[str]:
    if options.what == "adapter":
        base = Path(source.base).name if Path(source.base).exists() else source.base
        method = method_of(Path(source.adapters[-1]))
        lines = [OURS.format(place=place)]
        note = f"It goes on `{base}`, which is not in this folder."
        note += " PEFT loads it as any other LoRA." if method == "lora" else " Only this project's loader reads it."
    elif options.layout == "authors" or options.quantization.startswith("cpm-"):
        lines = [OURS.format(place=place), THEIRS.format(place=place)]
        note = (
            "The folder has the authors' own layout; where their Python files are not in it and the config does not "
            "name them on the hub, copy them beside the weights."
        )
    elif exported.plain:
        lines, note = [WHOLE.format(place=place)], ""
    else:
        lines = [OURS.format(place=place)]
        note = "transformers alone does not know this model."
        if exported.prefix:
            note = "The P-Tuning v2 prefix in the sub-folder `prefix` is read by this project's loader alone."
    return [*(f"```python\n{line}\n```" for line in lines), *([note] if note else [])]


def _parts(source: Lineage, facts: Facts) -> list[list[str]]:
    files = facts.base.get("files") or {}
    rows = [["base", f"`{facts.base.get('path') or source.base}`", facts.base.get("revision") or ""]]
    rows += [["", f"`{file}`", f"sha256 `{seen['sha256']}`"] for file, seen in sorted(files.items())]
    if source.quantization != "none":
        rows.append(["", f"held in {source.quantization} while it was trained on", ""])
    for adapter in source.adapters:
        rows.append([method_of(Path(adapter)), f"`{Path(adapter).name}`", f"sha256 `{folder_hash(adapter)}`"])
    return rows


def _data(facts: Facts) -> list[list[str]]:
    rows = []
    for use, datasets in sorted(facts.rows.items()):
        for name, counts in sorted(datasets.items()):
            files = facts.sources.get(name, {}).get("sha256", {})
            hashes = "<br>".join(f"`{file}` `{digest}`" for file, digest in sorted(files.items()))
            rows.append([name, use, *(f"{counts[what]:,}" for what in COUNTS), hashes])
    return rows


def _stages(facts: Facts) -> list[str]:
    """Who has results, base first: base, sft, and the algorithm."""
    who = {key.partition(".")[0] for key in facts.metrics if key.partition(".")[2] in TITLES}
    return sorted(who, key=lambda name: (name != "base", name != "sft", name))


def _results(facts: Facts) -> str:
    stages = _stages(facts)
    rows = [
        [title, *(_number(facts.metrics.get(f"{who}.{key}")) for who in stages)]
        for key, title in TITLES.items()
        if any(f"{who}.{key}" in facts.metrics for who in stages)
    ]
    return _table(["", *stages], rows)


def _checked(options: Export, exported: "Exported") -> str:
    against = "its source" if options.quantization == "none" else "the values that the rounded weights stand for"
    lines = [
        f"The folder was loaded again: its logits differ from those of {against} by less than "
        f"{exported.tolerance:g} of the largest one (largest difference {exported.max_logit_difference:.0e})."
    ]
    if exported.loss is not None and exported.source_loss is not None:
        lines.append(
            "Its weights, unpacked, are exactly those values. On the eight short answers of `glm/export/parity.py` the "
            f"loss went from {exported.source_loss:.3f} to {exported.loss:.3f} nats a token by the rounding."
        )
    return " ".join(lines)


def _licence(hub_id: str | None) -> str:
    base = f"[{hub_id}](https://huggingface.co/{hub_id})" if hub_id else "the base model"
    return (
        f"Weights that were made from others keep their terms: see the licence of {base}, and of each dataset above. "
        "This card grants none."
    )


def _yaml(parameters: dict[str, Any]) -> str:
    nested: dict[str, Any] = {}
    for name, value in parameters.items():
        *sections, key = name.split(".")
        node = nested
        for section in sections:
            node = node.setdefault(section, {})
        node[key] = value
    yaml, text = YAML(pure=True), StringIO()
    yaml.width = 110
    yaml.dump(nested, text)
    return text.getvalue()


def _table(columns: list[str], rows: list[list[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _number(value: float | None) -> str:
    return "" if value is None else f"{_rounded(value):g}"


def _rounded(value: float) -> float:
    return float(f"{value:.4g}") + 0.0  # no -0.0
