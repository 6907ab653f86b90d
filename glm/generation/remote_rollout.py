"""Rollouts by a vLLM server: the policy's LoRA is handed over before each batch, the prompts and answers are token ids.

    VLLM_ALLOW_RUNTIME_LORA_UPDATING=True vllm serve BASE --enable-lora --max-lora-rank 64

The server has the base that the policy stands on, and sees the files that are written here: it runs on the same
machine, or shares the folder. `glmflow serve BASE --enable-lora FOLDER` speaks the same protocol (checked against vLLM
0.28: /v1/load_lora_adapter, /v1/unload_lora_adapter, /v1/completions).
"""

import json
import shutil
import uuid
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, Self

import httpx
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from glm.data.encode import end_id
from glm.errors import InputError
from glm.files import replace_folder, write_json
from glm.generation.vllm_client import NO_DEFAULTS, RemoteError, check_status, open_client, served_model
from glm.models.adapters import causal_lm, save_lora

LARGEST_GAP = 0.5  # nats a token; bfloat16 and other kernels make some hundredths
CONNECTIONS = 64  # requests at once; the server puts them into its batches


class RemoteRollout:
    """A server that answers for a policy; a context in which the policy's adapter is there."""

    def __init__(self, url: str, folder: Path, api_key: str | None = None) -> None:
        """`folder` is where adapters are written: it is emptied.

        Raises:
            InputError: no server with a model answers at `url`.
        """
        self.url = url
        self.folder = folder.resolve()
        self.client = open_client(url, api_key, CONNECTIONS)
        self.splits = served_model(self.client).get("owned_by") == "vllm"
        shutil.rmtree(self.folder, ignore_errors=True)  # of a run that was killed
        self.loaded = ""  # name of the adapter that the server has
        self.checked = False  # whether its log-probabilities were compared with the policy's own

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        with suppress(httpx.HTTPError, RemoteError):  # a server that is gone has no adapters
            self._unload()
        self.client.close()
        shutil.rmtree(self.folder, ignore_errors=True)

    def sample(
        self,
        model: PeftModel,
        adapter: str,
        prompts: list[list[int]],
        tokenizer: PreTrainedTokenizerBase,
        *,
        max_new_tokens: int,
        temperature: float,
    ) -> tuple[list[list[int]], list[list[float]]]:
        """One answer to each prompt, drawn from the whole distribution of `model` under its LoRA `adapter`.

        Returns the answers' ids, with the end token where one was reached, and the server's own log-probabilities of
        them at temperature 1, in whose last place one may be missing. Seeds come from torch's global generator.

        Raises:
            InputError: the server refuses the adapter, does not answer, or answers something else.
        """
        end = end_id(tokenizer)
        seeds = torch.randint(2**31, (len(prompts),)).tolist()
        wishes = {
            "max_tokens": max_new_tokens,
            "temperature": temperature,
            "top_p": 1.0,
            "logprobs": 0,
            "stop_token_ids": [end],
            "ignore_eos": True,  # other ends than the one with which the policy was trained are tokens like any other
            "return_token_ids": True,
        } | NO_DEFAULTS
        try:
            self._load(model, adapter)
            bodies = [wishes | {"prompt": ids, "seed": seed} for ids, seed in zip(prompts, seeds, strict=True)]
            with ThreadPoolExecutor(CONNECTIONS) as pool:
                answers, logprobs = zip(*pool.map(lambda body: self._answer(body, end), bodies), strict=True)
        except (httpx.HTTPError, RemoteError, ValueError, KeyError) as error:
            raise InputError(f"rollout.url {self.url}: no answers: {str(error) or type(error).__name__}") from None
        return list(answers), list(logprobs)

    def check(self, own: Tensor, told: list[list[float]]) -> None:
        """Compare the policy's log-probabilities [n, a] with those that `sample` returned.

        Raises:
            InputError: they have little to do with each other.
        """
        gaps = []
        for mine, its in zip(own.tolist(), told, strict=True):
            gaps += [abs(one - other) for one, other in zip(mine, its, strict=False)]
        gap = sum(gaps) / max(1, len(gaps))
        if gap > LARGEST_GAP:
            raise InputError(
                f"rollout.url {self.url}: its log-probabilities differ from the policy's by {gap:.2f} nats a token: it "
                "serves another model than the one that the policy's LoRA stands on"
            )
        self.checked = True

    def _load(self, model: PeftModel, adapter: str) -> None:
        """Give the server the adapter as it is now, under a new name: what it has cached of the old one is not valid.

        The old one goes first, since a server may have room for one.
        """
        self._unload()
        name = f"policy-{uuid.uuid4().hex[:12]}"
        folder = self.folder / name
        with replace_folder(folder) as temporary:
            save_lora(model, temporary, base=causal_lm(model).config.name_or_path, name=adapter)
            if self.splits:
                split_gate_up(temporary)
        check_status(self.client.post("/v1/load_lora_adapter", json={"lora_name": name, "lora_path": str(folder)}))
        self.loaded = name

    def _unload(self) -> None:
        if self.loaded:
            name, self.loaded = self.loaded, ""
            check_status(self.client.post("/v1/unload_lora_adapter", json={"lora_name": name}))
            shutil.rmtree(self.folder / name)

    def _answer(self, body: dict[str, Any], end: int) -> tuple[list[int], list[float]]:
        response = self.client.post("/v1/completions", json={"model": self.loaded} | body)
        check_status(response)
        choice = response.json()["choices"][0]
        ids, reason = choice["token_ids"], choice["finish_reason"]
        if reason not in ("stop", "length"):
            raise RemoteError(f"an answer has ended by {reason}")
        if reason == "stop" and ids[-1:] != [end]:
            ids = [*ids, end]
        return ids, choice["logprobs"]["token_logprobs"]


def split_gate_up(folder: Path) -> None:
    """Write a LoRA of a fused gate_up_proj as two, of gate_proj and up_proj: vLLM's Llama-like classes know those."""
    weights: dict[str, Tensor] = {}
    for name, tensor in load_file(folder / "adapter_model.safetensors").items():
        halves = tensor.chunk(2) if ".lora_B." in name else (tensor, tensor)
        parts = zip(("gate_proj", "up_proj"), halves, strict=True) if ".gate_up_proj." in name else [("", tensor)]
        weights |= {name.replace("gate_up_proj", part): half.clone() for part, half in parts}
    save_file(weights, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config["target_modules"] = [
        name.replace("gate_up_proj", part)
        for name in config["target_modules"]
        for part in (("gate_proj", "up_proj") if name.endswith("gate_up_proj") else ("",))
    ]
    write_json(path, config)
