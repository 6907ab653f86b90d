"""Small stand-ins, in the formats of the real files, for the datasets that recipes name."""

import json
from pathlib import Path
from typing import Any

THINGS = ("上衣", "裙", "裤", "鞋", "包", "帽", "围巾", "手套", "毛衣", "衬衫")
LOOKS = ("红色", "蓝色", "格子", "刺绣", "宽松", "修身")


def rows(name: str) -> list[dict[str, Any]]:
    """Sixty rows as those of the dataset `name`."""
    pairs = [(thing, look) for thing in THINGS for look in LOOKS]
    if name == "adgen":
        return [
            {"content": f"类型#{thing}*图案#{look}", "summary": f"这款{look}的{thing}很好看，适合春天穿。"}
            for thing, look in pairs
        ]
    answers = [f"这件{look}的{thing}不错，可以买。" for thing, look in pairs]
    if name.startswith("comparison"):
        return [
            {"instruction": f"说说{look}的{thing}。", "input": "", "output": [answer, f"{thing}。"]}
            for (thing, look), answer in zip(pairs, answers, strict=True)
        ]
    return [
        {"instruction": f"{name}：{look}的{thing}怎么样？", "input": "", "output": answer}
        | ({"history": [[f"在吗？想问{look}的{thing}。", "在，请说。"]]} if name.startswith("covid") else {})
        for (thing, look), answer in zip(pairs, answers, strict=True)
    ]


def put_stand_ins(dataset_dir: Path) -> None:
    """Let the registry in `dataset_dir` find stand-ins in place of what would be downloaded or unpacked."""
    path = dataset_dir / "dataset_info.json"
    registry = json.loads(path.read_text(encoding="utf-8"))
    for name in ("adgen", "covid_train", "covid_dev", "comparison_gpt4_zh", "alpaca_gpt4_zh"):
        columns = {"columns": registry[name]["columns"]} if "columns" in registry[name] else {}
        registry[name] = {"file_name": f"stand_ins/{name}.json", **columns}
        file = dataset_dir / "stand_ins" / f"{name}.json"
        file.parent.mkdir(exist_ok=True)
        text = json.dumps(rows(name), ensure_ascii=False)
        if name == "adgen":  # its real file is called .json and has an object a line
            text = "\n".join(json.dumps(row, ensure_ascii=False) for row in rows(name))
        file.write_text(text, encoding="utf-8")
    path.write_text(json.dumps(registry, ensure_ascii=False, indent=1), encoding="utf-8")
