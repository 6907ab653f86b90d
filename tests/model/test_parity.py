"""The models compute what the original ChatGLM code computed (recorded in tests/golden)."""

import json
from functools import lru_cache
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from glm.models import load_model

GOLDEN = Path(__file__).parents[1] / "golden"
SHARED = Path(__file__).parents[3] / "shared" / "golden"
FOLDERS = {folder.name: folder for folder in sorted(GOLDEN.glob("chatglm*-tiny*"))}
FOLDERS |= {"chatglm3-tiny": SHARED / "chatglm3-tiny"} if SHARED.exists() else {}
SKIPPED = ("batch_leftpad_nomask", "gen_batch_leftpad_both")  # the original contradicts itself there, see README.md
LOGITS, LOSS, GRADIENT, HALF = 5e-5, 1e-5, 1e-4, 0.06  # tolerances; the last but one is relative

CASES = [
    (name, case["name"])
    for name, folder in FOLDERS.items()
    for case in json.loads((folder / "inputs.json").read_text())["cases"]
    if case["name"] not in SKIPPED
]


@lru_cache
def inputs(folder):
    cases = json.loads((FOLDERS[folder] / "inputs.json").read_text())["cases"]
    return {case["name"]: case for case in cases}


@lru_cache
def expected(folder):
    path = FOLDERS[folder]
    return load_file(path / "expected.safetensors"), json.loads((path / "expected.json").read_text())


@lru_cache
def model(folder, attention="sdpa", dtype=torch.float32):
    path = FOLDERS[folder]
    prefix = path / "prefix_encoder.safetensors"
    return load_model(path, adapters=[prefix] if prefix.exists() else [], dtype=dtype, attn_implementation=attention)


def keep_mask(case, pad):
    """The 2-D mask with 1 = keep, for either generation's way of writing masks."""
    ids = torch.tensor(case["input_ids"])
    mask = torch.tensor(case["attention_mask"]) if "attention_mask" in case else torch.ones_like(ids)
    if mask.dim() == 2 and case["name"] != "batch_rightpad_train":
        return mask
    return torch.tensor(case["valid"]) if "valid" in case else (ids != pad).long().cummax(-1).values


def forward(model, case, **options):
    mask = keep_mask(case, model.config.pad_token_id)
    arguments = {"input_ids": torch.tensor(case["input_ids"]), "attention_mask": mask}
    arguments |= {name: torch.tensor(case[name]) for name in ("labels", "position_ids") if name in case}
    return model(**arguments, **options)


def logit_difference(output, case, wanted, name):
    if f"{name}.logits" in wanted:
        valid = torch.tensor(case.get("valid", [[1] * len(row) for row in case["input_ids"]])).bool()
        return (output.logits.float() - wanted[f"{name}.logits"].float())[valid].abs().max().item()
    return (output.logits[:, -12:].float() - wanted[f"{name}.logits_last12"].float()).abs().max().item()


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize(("folder", "name"), [case for case in CASES if not case[1].startswith("gen")])
def test_logits_and_loss(folder, name, attention):
    case, (wanted, numbers) = inputs(folder)[name], expected(folder)
    with torch.no_grad():
        output = forward(model(folder, attention), case)
    assert logit_difference(output, case, wanted, name) < LOGITS
    if "labels" in case:
        assert abs(output.loss.item() - numbers[f"{name}.loss"]) < LOSS


@pytest.mark.parametrize(("folder", "name"), [case for case in CASES if case[1].startswith("gen")])
def test_greedy_tokens(folder, name):
    case, (_, numbers) = inputs(folder)[name], expected(folder)
    output = model(folder).generate(
        input_ids=torch.tensor(case["input_ids"]),
        attention_mask=keep_mask(case, case["pad_token_id"]),
        do_sample=False,
        max_new_tokens=case["max_new_tokens"],
        eos_token_id=case["eos_token_id"],
        pad_token_id=case["pad_token_id"],
    )
    assert output.tolist() == numbers[name]["sequences"]


@pytest.mark.parametrize("folder", FOLDERS)
def test_hidden_states(folder):
    wanted, _ = expected(folder)
    names = {name.partition(".hidden.")[0] for name in wanted if ".hidden." in name}
    for name in names:
        with torch.no_grad():
            states = forward(model(folder), inputs(folder)[name], output_hidden_states=True).hidden_states
        # The original ChatGLM2 and 3 give the last state before the final norm, transformers after it.
        for number, state in enumerate(states if folder.startswith("chatglm1") else states[:-1]):
            assert (state - wanted[f"{name}.hidden.{number}"]).abs().max() < LOGITS


@pytest.mark.parametrize("folder", [name for name in FOLDERS if not name.endswith(("-int4", "-int8"))])
def test_gradient_norms(folder):
    """Every parameter's gradient has the recorded length. The original's fused q/k/v is three parameters in Glm."""
    _, numbers = expected(folder)
    for name, norms in numbers.items():
        if not name.endswith(".grad_norms"):
            continue
        tested = load_model(FOLDERS[folder], adapters=prefixes(folder), dtype=torch.float32)
        forward(tested, inputs(folder)[name.removesuffix(".grad_norms")]).loss.backward()
        found = {original_name(key): 0.0 for key, _ in tested.named_parameters()}
        for key, parameter in tested.named_parameters():
            if parameter.grad is not None:
                found[original_name(key)] += parameter.grad.square().sum().item()
        for key, norm in norms.items():
            assert found[key] ** 0.5 == pytest.approx(norm, rel=GRADIENT), key


def prefixes(folder):
    path = FOLDERS[folder] / "prefix_encoder.safetensors"
    return [path] if path.exists() else []


def original_name(name):
    for ours, theirs in {
        "model.embed_tokens": "transformer.embedding.word_embeddings",
        "model.layers": "transformer.encoder.layers",
        "model.norm": "transformer.encoder.final_layernorm",
        "model.prefix_encoder": "transformer.prefix_encoder",
        "lm_head": "transformer.output_layer",
        "self_attn.o_proj": "self_attention.dense",
        "self_attn.q_proj": "self_attention.query_key_value",
        "self_attn.k_proj": "self_attention.query_key_value",
        "self_attn.v_proj": "self_attention.query_key_value",
        "mlp.gate_up_proj": "mlp.dense_h_to_4h",
        "mlp.down_proj": "mlp.dense_4h_to_h",
    }.items():
        name = name.replace(ours, theirs)
    return name


@pytest.mark.parametrize(
    ("folder", "name"),
    [
        (folder, key.removesuffix("_fp16").rpartition(".")[0])
        for folder in FOLDERS
        for key in expected(folder)[0]
        if key.endswith("_fp16") and "logits" in key
    ],
)
def test_float16(folder, name):
    """ChatGLM-6B's rope angles in half precision are reproduced, ChatGLM2's are not (see glm/models/chatglm2.py)."""
    case, (wanted, _) = inputs(folder)[name], expected(folder)
    halves = {key.removesuffix("_fp16"): value for key, value in wanted.items() if key.endswith("_fp16")}
    with torch.no_grad():
        output = forward(model(folder, dtype=torch.float16), case)
    assert logit_difference(output, case, halves, name) < HALF


@pytest.mark.parametrize("folder", ["chatglm1-tiny", "chatglm2-tiny"])
def test_sharded_bin_files(folder, tmp_path):
    """The original's own layout of two `.bin` shards gives the same logits as one safetensors file."""
    tensors = load_file(FOLDERS[folder] / "model.safetensors")
    shards = list(tensors)[::2], list(tensors)[1::2]
    weight_map = {}
    for number, names in enumerate(shards, 1):
        file = f"pytorch_model-{number:05}-of-00002.bin"
        torch.save({name: tensors[name] for name in names}, tmp_path / file)
        weight_map |= dict.fromkeys(names, file)
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (tmp_path / "config.json").write_text((FOLDERS[folder] / "config.json").read_text())
    case = next(iter(inputs(folder).values()))
    with torch.no_grad():
        loaded = forward(load_model(tmp_path, dtype=torch.float32), case)
        assert torch.equal(loaded.logits, forward(model(folder), case).logits)


def test_sharded_safetensors(tmp_path):
    tensors = load_file(FOLDERS["chatglm2-tiny"] / "model.safetensors")
    weight_map = {}
    for number, name in enumerate(tensors):
        file = f"model-{number % 3 + 1:05}-of-00003.safetensors"
        weight_map[name] = file
    for file in set(weight_map.values()):
        save_file({name: tensors[name] for name in tensors if weight_map[name] == file}, tmp_path / file)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (tmp_path / "config.json").write_text((FOLDERS["chatglm2-tiny"] / "config.json").read_text())
    case = inputs("chatglm2-tiny")["single"]
    with torch.no_grad():
        loaded = forward(load_model(tmp_path, dtype=torch.float32), case)
        assert torch.equal(loaded.logits, forward(model("chatglm2-tiny"), case).logits)
