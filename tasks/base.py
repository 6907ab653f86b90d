"""Make models/base: the tiny embedded model and its tokenizer, or a pointer to the model of model.path.

A real model is not copied: models/base/source.json names its folder or hub commit and the sha256 of each of its files.
models/base/adapters.json does the same for model.adapters, if there are any.
"""

from pathlib import Path

from glm.config import EMBEDDED
from glm.data.rows import question_of, read_split
from glm.files import replace_folder, write_json
from tasks.base_model import ADAPTERS, BASE, describe, describe_adapters
from tasks.stage import Stage, main

ROWS = "prepared/rows"


def run(stage: Stage) -> dict[str, float]:
    params = stage.params.model
    if params.path != EMBEDDED:
        source = describe(params.path, params.revision)
        with replace_folder(BASE) as folder:
            write_json(folder / "source.json", source)
            _write_adapters(folder, params.adapters)
        return {"bytes": sum(file["size"] for file in source["files"].values())}
    return _train_embedded(stage)


def _train_embedded(stage: Stage) -> dict[str, float]:
    from glm.models import embedded

    texts = {split: [row["text"] for row in read_split(ROWS, "text", split)] for split in ("train", "dev")}
    dialogues = read_split(ROWS, "sft", "train")
    words = [question_of(row) for row in dialogues] + [row["messages"][-1]["content"] for row in dialogues]
    stage.log_dataset("text", f"{ROWS}/text/train.jsonl", split="train", rows=len(texts["train"]))
    params = stage.params.model.embedded
    with replace_folder(BASE) as folder:
        tokenizer = embedded.train_tokenizer(texts["train"] + words, params.vocab_size, folder)
        model = embedded.new_model(params, tokenizer)
        numbers = embedded.pretrain(
            model,
            tokenizer,
            texts["train"],
            texts["dev"],
            params,
            seed=stage.params.seed,
            log=stage.log,
            progress=stage.progress,
        )
        model.save_pretrained(folder)
        _write_adapters(folder, stage.params.model.adapters)
    return numbers


def _write_adapters(folder: Path, adapters: list[str]) -> None:
    if adapters:
        write_json(folder / ADAPTERS, describe_adapters(adapters))


if __name__ == "__main__":
    main("base", run)
