"""Challenger and champion answer the same held-out rows and are scored alike: what the gate (flows/gate.py) decides by.

    python -m tasks.judge                                        models/export alone
    python -m tasks.judge --champion models:/rlhf-policy/3       and a registered version beside it

No stage of dvc.yaml: who the champion is changes without any file changing. Both models are asked as they would be
served (each with its own system prompt) on the test split of this run; a question that the champion may have been
trained on, because its run split otherwise, is left out for both. The reward model of this run scores the texts.

Writes reports/judge: rows.jsonl, one line a test row with each model's answer and numbers, and summary.json.
"""

import argparse
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from glm.config import Data, Params, load_params
from glm.data.prepare import split_of
from glm.data.rows import Row, question_of, read_split, spread
from glm.errors import InputError
from glm.files import replace_folder, write_json, write_jsonl
from tasks.stage import Progress, fix_environment, seed_everything
from tasks.tokenized import ROWS

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

OUT = Path("reports/judge")
TIMED_ANSWERS = 8  # answered one by one, after one that is not counted


@dataclass(frozen=True)
class Contender:
    """A model, and how it is asked."""

    name: str
    folder: Path  # of a whole model, or of an adapter that knows what it stands on
    data: Data
    adapters: tuple[Path, ...] = ()  # on it
    quantization: str | None = None  # of it; None: as its files say
    double_quantization: bool = True


def judge(params: Params, champion: str | None, progress: Progress) -> dict[str, Any]:
    """Judge models/export, and the model at the URI `champion` if there is one; write reports/judge.

    Returns the summary: per model the means and the latency, and how many rows there were.

    Raises:
        InputError: there is no test row, or none that the champion has not been trained on.
    """
    contenders = [Contender("challenger", Path("models/export"), params.data)]
    asked, prompts = read_split(ROWS, "sft", "test"), read_split(ROWS, "ppo", "test")
    left_out = 0
    if champion:
        contender, splits = open_champion(champion, params)
        contenders.append(contender)
        left_out = len(asked) + len(prompts)
        asked, prompts = ([row for row in rows if is_test(row, splits)] for rows in (asked, prompts))
        left_out -= len(asked) + len(prompts)
    if not asked or not prompts:
        why = f"{champion}: it may have been trained on every test row of this run" if champion else "no test row"
        raise InputError(f"{why} (data.test_ratio)")
    asked = spread(asked, params.evaluate.max_samples)
    prompts = prompts[: params.evaluate.max_samples]

    rows = [{"id": row["id"], "use": "sft", "prompt": question_of(row)} for row in asked]
    rows += [{"id": row["id"], "use": "ppo", "prompt": question_of(row)} for row in prompts]
    summary: dict[str, Any] = {"rows": {"sft": len(asked), "ppo": len(prompts), "left_out": left_out}}
    for number, contender in enumerate(contenders):
        progress.show(number, len(contenders) + 1, f"{contender.name} answers")
        found, latency = answer(contender, asked, prompts, params)
        for row, values in zip(rows, found, strict=True):
            row[contender.name] = values
        summary[contender.name] = {"latency": latency}
    progress.show(len(contenders), len(contenders) + 1, "reward")
    score(rows[len(asked) :], prompts, [contender.name for contender in contenders], params)
    for contender in contenders:
        numbers = [values_of(row[contender.name]) for row in rows]
        for metric in dict.fromkeys(name for values in numbers for name in values):
            summary[contender.name][metric] = statistics.fmean(v[metric] for v in numbers if metric in v)
    progress.show(len(contenders) + 1, len(contenders) + 1)

    with replace_folder(OUT) as folder:
        write_jsonl(folder / "rows.jsonl", rows)
        write_json(folder / "summary.json", summary)
    return summary


def open_champion(uri: str, params: Params) -> tuple[Contender, Data]:
    """A registered model, and the parameters by which its own run split the data: this run's, if that one is gone.

    Raises:
        InputError: its files are not in the store any more, or this project has not logged it.
    """
    from mlflow.artifacts import download_artifacts
    from mlflow.exceptions import MlflowException

    from tasks.logged_models import logged_folders
    from tasks.registered import find_version
    from tasks.tracking import open_store

    client, _ = open_store(params.tracking.experiment)
    data = params.data
    version = find_version(client, uri)
    other = "`glmflow rollback` or `glmflow promote` makes another version the champion"
    try:
        folders, config = logged_folders(download_artifacts(uri))
    except Exception as error:  # whatever a store, a driver or a network may raise
        raise InputError(f"{uri}: the champion's files cannot be had from the store ({error}): {other}") from None
    if not folders or "data" not in config:
        raise InputError(f"{uri}: the champion was not logged by this project, so it cannot be asked alike: {other}")
    base, *adapters = folders
    own = data.model_copy(update=config["data"])
    run_id = version.tags.get("glmflow.run.pipeline")
    try:
        known = client.get_run(run_id).data.params if run_id else {}
    except MlflowException:
        known = {}
    if not known:
        print(f"{uri}: its run is gone from the store, so its rows count as split like this run's", file=sys.stderr)
    splits = {name: float(known[f"data.{name}"]) for name in ("dev_ratio", "test_ratio") if f"data.{name}" in known}
    contender = Contender(
        "champion",
        Path(base),
        own,
        tuple(map(Path, adapters)),
        config["quantization"],
        config.get("double_quantization", True),  # not in models that were logged before
    )
    return contender, data.model_copy(update=splits)


def is_test(row: Row, splits: Data) -> bool:
    """Would the row be in the test split with these ratios? It depends on its question alone (glm.data.prepare)."""
    return split_of(row.get("group") or question_of(row), splits.dev_ratio, splits.test_ratio) == "test"


def answer(
    contender: Contender, asked: list[Row], prompts: list[Row], params: Params
) -> tuple[list[dict[str, Any]], float]:
    """What a model makes of each row of `asked` (loss, greedy answer) and of `prompts` (sampled answer); its latency.

    The latency is the median of the seconds that one greedy answer takes on its own.
    """
    import torch

    from glm.data.encode import prompt_ids
    from glm.evaluation.text_metrics import score as text_score
    from glm.generation.decode import decode, generate
    from glm.models import load_model, load_tokenizer
    from glm.training.policy_eval import repetition

    options = params.evaluate
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = load_model(
        contender.folder,
        adapters=contender.adapters,
        dtype=params.model.dtype,
        device=device,
        quantization=contender.quantization,
        double_quantization=contender.double_quantization,
    )
    tokenizer = load_tokenizer(str(contender.folder))
    limits = {"max_new_tokens": options.max_new_tokens, "batch_size": options.batch_size}
    questions = [prompt_ids(tokenizer, row["messages"][:-1], contender.data)[0] for row in asked]
    greedy = [decode(tokenizer, ids) for ids in generate(model, tokenizer, questions, **limits)]
    found: list[dict[str, Any]] = []
    for row, text in zip(asked, greedy, strict=True):
        label = row["messages"][-1]["content"]
        scores = text_score(text, label)
        loss = nats_per_character(model, tokenizer, row, contender.data)
        found.append(
            {
                "answer": text,
                "rouge_l": scores["rouge-l"],
                "bleu_4": scores["bleu-4"],
                "nats_per_character": loss,
            }
        )
    torch.manual_seed(params.seed)
    openings = [prompt_ids(tokenizer, row["prompt"], contender.data)[0] for row in prompts]
    drawn = generate(model, tokenizer, openings, **limits, do_sample=True, temperature=options.temperature)
    found += [{"answer": decode(tokenizer, ids), "repetition": repetition([ids])} for ids in drawn]

    seconds = []
    for question in [questions[0], *questions[:TIMED_ANSWERS]]:
        started = time.perf_counter()
        generate(model, tokenizer, [question], **limits)
        seconds.append(time.perf_counter() - started)
    return found, statistics.median(seconds[1:])


def nats_per_character(model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", row: Row, data: Data) -> float:
    """The loss on a row's answer, its end included, over the answer's characters: comparable between tokenizers."""
    from glm.data.encode import IGNORED, dialogue
    from glm.training.sft import mean_loss

    example = dialogue(tokenizer, row["messages"], data)
    learned = sum(label != IGNORED for label in example["labels"])
    text = row["messages"][-1]["content"]
    return mean_loss(model, tokenizer, [example], batch_size=1) * learned / max(1, len(text))


def score(rows: list[dict[str, Any]], prompts: list[Row], names: list[str], params: Params) -> None:
    """Put the reward of each model's answer beside it, as this run's reward model sees its text."""
    from glm.data.encode import dialogue
    from glm.training import reward
    from tasks.base_model import load_base

    base, tokenizer = load_base(params)
    scorer = reward.load(base, Path("models/reward"))
    for name in names:
        dialogues = [
            [*prompt["prompt"], {"role": "assistant", "content": row[name]["answer"]}]
            for row, prompt in zip(rows, prompts, strict=True)
        ]
        sequences = [dialogue(tokenizer, messages, params.data)["input_ids"] for messages in dialogues]
        found = reward.scores_of(scorer, sequences, tokenizer.pad_token_id, params.evaluate.batch_size)
        for row, value in zip(rows, found.tolist(), strict=True):
            row[name]["reward"] = value


def values_of(values: dict[str, Any]) -> dict[str, float]:
    """The numbers of one model's entry in a row."""
    return {name: value for name, value in values.items() if name != "answer"}


def main() -> int:
    """The command line. Returns the exit status."""
    fix_environment()
    parser = argparse.ArgumentParser(prog="python -m tasks.judge", description="Score challenger and champion alike.")
    parser.add_argument("--champion", help="models:/NAME/VERSION of the model to compare with")
    arguments = parser.parse_args()
    progress = Progress("judge")
    try:
        params = load_params()
        seed_everything(params.seed, uses_torch=True)
        judge(params, arguments.champion, progress)
    except InputError as error:
        print(error, file=sys.stderr)
        return 2
    finally:
        progress.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
