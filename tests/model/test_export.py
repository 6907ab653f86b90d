"""Exports: the layouts are those they claim to be, answers are the source's, and what is wrong leaves no trace."""

import json
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from glm.config import EmbeddedModel, Export
from glm.errors import InputError
from glm.export import writing
from glm.export.authors import write_authors
from glm.export.facts import Facts
from glm.export.writing import export, needed_bytes
from glm.models import embedded, load_model, load_tokenizer
from glm.models.lineage import Lineage, above
from glm.models.prefix import new_prefix, prefix_of
from glm.models.quantization import BLOCK_LINEAR
from glm.models.saving import load_unmerged, probe_outputs, save_trained
from tasks.logged_models import artifact_folders
from tests.model.hub_server import TOKEN, hub

ROOT = Path(__file__).parents[2]
GOLDEN = ROOT / "tests" / "golden"
FACTS = Facts(
    algorithm="ppo",
    sources={"pairs": {"entry": {"hf_hub_url": "owner/pairs"}, "sha256": {"rows.jsonl": "ab" * 32}}},
    rows={"reward": {"pairs": {"read": 1200, "kept": 1100, "train": 900, "dev": 100, "test": 100}}},
    base={"path": "owner/base", "revision": "c0ffee", "files": {"model.safetensors": {"sha256": "cd" * 32}}},
    metrics={"sft.loss": 4.9283, "ppo.loss": 5.2291, "ppo.reward": 1.68, "reward.accuracy": 0.84},
    parameters={"seed": 42, "sft.lora_rank": 8, "model.path": "owner/base"},
    origin={"commit": "1234"},
)


def trained_lora(base: str, folder: Path, below: Lineage | None = None, quantization: str = "none") -> Lineage:
    """A LoRA with an effect, saved as a stage saves one; the lineage of what is on top of it."""
    below = below or Lineage(str(GOLDEN / base), dtype="float32", quantization=quantization)
    torch.manual_seed(len(below.adapters) + 1)
    model = load_unmerged(below)
    config = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)
    tuned = get_peft_model(model if not isinstance(model, PeftModel) else model.merge_and_unload(), config)
    save_trained(tuned, "lora", folder, below)
    return above(folder)


@pytest.mark.parametrize("name", ["chatglm1-tiny", "chatglm2-tiny", "chatglm2-32k-tiny", "chatglm3-32k-tiny"])
def test_the_authors_layout_is_that_of_their_files(name: str, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(GOLDEN / f"tokenizer-{name.partition('-')[0]}-tiny")
    options = {"base": GOLDEN / name, "hub_id": None, "bits": None, "max_shard_size": "2GB"}
    write_authors(load_model(GOLDEN / name), tokenizer, tmp_path, **options)
    assert_same_tensors(tmp_path, GOLDEN / name)
    ours, theirs = (json.loads((folder / "config.json").read_text()) for folder in (tmp_path, GOLDEN / name))
    theirs["auto_map"].pop("AutoModelForSequenceClassification", None)
    told = {"transformers_version", "_name_or_path"}  # by whom it was written, and which of several repositories
    assert {**ours, **{key: theirs[key] for key in told}} == {"quantization_bit": 0, **theirs}
    again = load_tokenizer(tmp_path)
    assert type(again) is type(tokenizer) and again("你好，<sop>")["input_ids"] == tokenizer("你好，<sop>")["input_ids"]


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("name", ["chatglm1-tiny", "chatglm2-tiny"])
def test_what_their_code_has_packed_is_packed_alike_again(name: str, bits: int, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(GOLDEN / f"tokenizer-{name}")
    packed = GOLDEN / f"{name}-int{bits}"
    whole = load_model(packed, dtype=torch.float16, dequantize=True)
    options = {"base": packed, "hub_id": "owner/name", "bits": bits, "max_shard_size": "2GB"}
    write_authors(whole, tokenizer, tmp_path, **options)
    assert_same_tensors(tmp_path, packed)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["quantization_bit"] == bits
    assert config["auto_map"]["AutoModel"] == "owner/name--modeling_chatglm.ChatGLMForConditionalGeneration"


def assert_same_tensors(one: Path, other: Path) -> None:
    found, wanted = (load_file(folder / "model.safetensors") for folder in (one, other))
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name


@pytest.mark.parametrize("base", ["chatglm1-e2e", "chatglm2-e2e"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"layout": "authors", "dtype": "bfloat16", "max_shard_size": "1MB"},
        {"quantization": "cpm-int4"},
        {"quantization": "cpm-int8", "dtype": "float16"},
        {"quantization": "nf4"},
    ],
)
def test_an_export_answers_as_its_source(base: str, options: dict[str, str], tmp_path: Path) -> None:
    source = trained_lora(base, tmp_path / "sft")
    done = export(source, tmp_path / "out", Export(**options), FACTS)
    loaded = load_model(tmp_path / "out", dtype="float32")
    if not options.get("quantization"):
        difference = (probe_outputs(loaded) - probe_outputs(load_unmerged(source))).abs().max()
        assert difference < (5e-2 if options else 1e-5) * probe_outputs(loaded).abs().max()
    assert (done.loss is not None) == ("quantization" in options) and abs(done.loss_increase) < 0.5
    if "quantization" in options:
        assert loaded.is_quantized and done.loss_increase != 0
        values = dict(loaded.dequantize(torch.float32).named_parameters())
        step = {"cpm-int8": 1 / 127, "cpm-int4": 1 / 7, "nf4": 0.31}[options["quantization"]]
        for key, weight in writing.merged(source, "float32").named_parameters():
            if step == 0.31 and weight.shape[-1] % 64:
                continue  # bitsandbytes on a CPU is further off where blocks go across rows
            largest = weight.abs().max() if step == 0.31 else weight.abs().amax(-1, keepdim=True)  # nf4: of a block
            allowed = 1e-3 + (step / 2 if BLOCK_LINEAR.search(f".{key}") else 0)
            assert ((values[key] - weight).abs() <= allowed * largest).all(), key
    assert load_tokenizer(tmp_path / "out")("你好")["input_ids"] == load_tokenizer(GOLDEN / base)("你好")["input_ids"]
    assert done.size <= sum(file.stat().st_size for file in (tmp_path / "out").iterdir())
    assert {file.stat().st_mode & 0o777 for file in (tmp_path / "out").iterdir()} == {0o644}


def test_plain_transformers_loads_the_export_of_chatglm2(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(GOLDEN / "chatglm2-e2e")
    # bitsandbytes on a CPU with AVX512 wants rows of whole blocks of 64
    shape = EmbeddedModel(hidden_size=64, num_layers=2, ffn_hidden_size=128)
    torch.manual_seed(0)
    embedded.new_model(shape, tokenizer).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    source = trained_lora("", tmp_path / "sft", Lineage(str(tmp_path / "base"), dtype="float32"))
    for name in ("none", "nf4"):
        export(source, tmp_path / name, Export(quantization=name), FACTS)
    torch.save(probe_outputs(load_unmerged(source)), tmp_path / "wanted.pt")
    program = (
        "import torch, transformers\n"
        "ids = torch.tensor([[*range(5, 29)]])\n"
        "wanted = torch.load('wanted.pt')[:24]\n"
        "for name, allowed in (('none', 1e-4), ('nf4', 2.0)):\n"
        "    model = transformers.AutoModelForCausalLM.from_pretrained(name).eval()\n"
        "    assert type(model).__name__ == 'GlmForCausalLM'\n"
        "    found = model(ids).logits[0]\n"
        "    assert (found - wanted).abs().max() < allowed, (name, (found - wanted).abs().max())\n"
        "    print(transformers.AutoTokenizer.from_pretrained(name)('你好')['input_ids'])\n"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    ids = tokenizer("你好")["input_ids"]
    assert done.returncode == 0 and done.stdout.splitlines() == [str(ids)] * 2, done.stderr
    config = json.loads((tmp_path / "none" / "config.json").read_text())
    assert config["architectures"] == ["GlmForCausalLM"] and "auto_map" not in config  # by this name vLLM knows it


@pytest.mark.parametrize("options", [{"layout": "authors"}, {"quantization": "cpm-int4"}, {}])
def test_a_prefix_comes_along(options: dict[str, str], tmp_path: Path) -> None:
    below = Lineage(str(GOLDEN / "chatglm2-e2e"), dtype="float32")
    model = load_model(below.base, dtype="float32")
    new_prefix(model, 4)
    save_trained(model, "p_tuning", tmp_path / "sft", below)
    done = export(above(tmp_path / "sft"), tmp_path / "out", Export(**options), FACTS)
    loaded = load_model(tmp_path / "out")
    assert torch.equal(prefix_of(loaded).embedding.weight, model.base_model.prefix_encoder.embedding.weight)
    if "layout" in options:  # where the authors' own code looks for it
        assert json.loads((tmp_path / "out" / "config.json").read_text())["pre_seq_len"] == 4
        names = load_file(tmp_path / "out" / "model.safetensors")
        assert "transformer.prefix_encoder.embedding.weight" in names
    assert not done.plain


@pytest.mark.parametrize("quantization", ["none", "nf4"])
@pytest.mark.parametrize("number", [1, 2])
def test_an_adapter_alone(number: int, quantization: str, tmp_path: Path) -> None:
    source = trained_lora("chatglm2-tiny", tmp_path / "sft", quantization=quantization)
    if number == 2:
        below, wanted = source, None
        torch.manual_seed(2)
        config = LoraConfig(r=2, target_modules=["o_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
        tuned = get_peft_model(load_model(source.base, dtype="float32"), config)
        save_trained(tuned, "lora", tmp_path / "ppo", below)
        source = above(tmp_path / "ppo")
    wanted = probe_outputs(load_unmerged(source))
    export(source, tmp_path / "out", Export(what="adapter"), FACTS)
    assert not {"model.safetensors", "config.json"} & {file.name for file in (tmp_path / "out").iterdir()}
    torch.testing.assert_close(probe_outputs(load_model(tmp_path / "out")), wanted, atol=2e-4, rtol=1e-4)
    folders, kept = artifact_folders(tmp_path / "out")  # as MLflow keeps it
    assert folders == [source.base, str(tmp_path / "out")]
    logged = load_model(folders[0], adapters=folders[1:], **kept, dtype="float32")
    torch.testing.assert_close(probe_outputs(logged), wanted, atol=2e-4, rtol=1e-4)
    if quantization == "none":  # PEFT alone
        plain = PeftModel.from_pretrained(load_model(source.base, dtype="float32"), str(tmp_path / "out")).eval()
        torch.testing.assert_close(probe_outputs(plain), wanted, atol=2e-4, rtol=1e-4)
    base = json.loads((tmp_path / "out" / "adapter_config.json").read_text())["base_model_name_or_path"]
    assert base == source.base


def test_the_card(tmp_path: Path) -> None:
    source = trained_lora("chatglm2-e2e", tmp_path / "sft")
    for number in range(2):
        export(source, tmp_path / f"out{number}" / "reviews", Export(), FACTS)
    export(source, tmp_path / "rounded", Export(quantization="cpm-int8"), FACTS)
    first, second = ((tmp_path / f"out{number}" / "reviews" / "README.md").read_text() for number in range(2))
    assert first == second
    card, rounded = ModelCard(first), ModelCard((tmp_path / "rounded" / "README.md").read_text())
    assert card.data.base_model == "owner/base" and card.data["base_model_relation"] == "finetune"
    assert rounded.data["base_model_relation"] == "quantized" and rounded.data.eval_results is None
    assert "measured before the weights were rounded" in rounded.text
    assert card.data.datasets == ["owner/pairs"] and card.data.pipeline_tag == "text-generation"
    assert {result.metric_type: result.metric_value for result in card.data.eval_results} == {
        "loss": 5.229,
        "reward": 1.68,
    }
    for words in (
        "| pairs | reward | 1,200 | 1,100 | 900 | 100 | 100 |",
        "ab" * 32,
        "cd" * 32,
        "lora_rank: 8",
        "| lora |",
    ):
        assert words in first
    assert (
        "| loss, nats a token | 4.928 | 5.229 |" in first
        and "commit | 1234" in first
        and "licence of [owner/base]" in first
    )


def test_what_cannot_be_is_refused_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = Lineage(str(GOLDEN / "chatglm2-e2e"))
    lora = trained_lora("chatglm2-e2e", tmp_path / "sft")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").touch()
    refused = [
        (lambda: export(base, tmp_path / "mine", Export(), FACTS), "exists already"),
        (lambda: export(base, tmp_path / "mine", Export(), FACTS, overwrite=True), "something else than a model"),
        (lambda: export(lora, tmp_path / "sft", Export(), FACTS, overwrite=True), "lies there"),
        (lambda: export(lora, tmp_path, Export(), FACTS, overwrite=True), "lies there"),
        (lambda: export(base, tmp_path / "out", Export(what="adapter"), FACTS), "without an adapter"),
    ]
    for call, words in refused:
        with pytest.raises(InputError, match=words):
            call()
    monkeypatch.setattr(writing.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 10, 1000))
    with pytest.raises(InputError, match=r"needs 0\.0 GB, and the disk has 0\.0 GB free"):
        export(base, tmp_path / "out", Export(), FACTS)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine", "sft"]


@pytest.mark.parametrize(
    "options", [{}, {"dtype": "float16"}, {"quantization": "cpm-int4"}, {"quantization": "cpm-int8"}]
)
def test_the_space_that_is_asked_for_is_about_what_it_takes(options: dict[str, str], tmp_path: Path) -> None:
    base = GOLDEN / "chatglm2-e2e"
    needed = needed_bytes(base, Lineage(str(base)), Export(**options))
    done = export(Lineage(str(base)), tmp_path / "out", Export(**options), FACTS)
    weights = (done.folder / "model.safetensors").stat().st_size
    assert 0.9 * weights < needed < 1.15 * weights


@pytest.mark.parametrize("options", [{}, {"layout": "authors"}, {"quantization": "cpm-int4"}])
def test_bytes_that_change_on_their_way_leave_no_export(
    options: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def spoil(write, tensors, filename, metadata=None):
        largest = max((name for name in tensors if ".layers." in name), key=lambda name: tensors[name].numel())
        write(tensors | {largest: -tensors[largest]}, filename, metadata=metadata)

    monkeypatch.setattr("transformers.modeling_utils.safe_save_file", partial(spoil, save_file))
    monkeypatch.setattr("safetensors.torch.save_file", partial(spoil, save_file))
    with pytest.raises(RuntimeError, match="differ"):
        export(Lineage(str(GOLDEN / "chatglm2-e2e")), tmp_path / "out", Export(**options), FACTS)
    assert not list(tmp_path.iterdir())


def test_an_export_goes_to_the_hub_and_comes_back(tmp_path: Path) -> None:
    """huggingface_hub's own client against a server that speaks its protocol, xet storage left out."""
    export(Lineage(str(GOLDEN / "chatglm2-e2e")), tmp_path / "out", Export(push_to_hub="me/reviews"), FACTS)
    program = (
        "import os, sys\n"
        "from pathlib import Path\n"
        "from glm.errors import InputError\n"
        "from glm.export.hub import check_access, push\n"
        "from glm.models.checkpoint import local_folder\n"
        "os.environ['HF_TOKEN'] = 'hf_wrong'\n"
        "for refused in (lambda: check_access('me/reviews'), lambda: push(Path('out'), 'me/reviews', True)):\n"
        "    try:\n"
        "        refused()\n"
        "    except InputError as error:\n"
        "        print(error)\n"
        "os.environ['HF_TOKEN'] = sys.argv[1]\n"
        "check_access('me/reviews')\n"
        "print(push(Path('out'), 'me/reviews', True))\n"
        "print(local_folder('me/reviews'))\n"
    )
    with hub() as server:
        environment = {"HOME": str(tmp_path), "HF_ENDPOINT": server.url, "HF_HUB_DISABLE_XET": "1"}
        done = subprocess.run(
            [sys.executable, "-c", program, TOKEN],
            cwd=tmp_path, env=environment | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=120,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        unknown, unsent, commit, folder = done.stdout.splitlines()
        assert "the hub does not know you" in unknown and "not sent, out is complete" in unsent
        assert commit.startswith(f"{server.url}/me/reviews/commit/")
        assert server.private == {"me/reviews": True} and server.messages == ["export"]
        sent = server.files["me/reviews"]
    assert sent == {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()}
    assert torch.equal(probe_outputs(load_model(folder)), probe_outputs(load_model(tmp_path / "out")))
