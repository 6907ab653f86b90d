"""Adapters that clients load and unload, as with vLLM's server; only where the server was started so."""

from pathlib import Path

from fastapi import FastAPI
from fastapi.responses import PlainTextResponse
from starlette.exceptions import HTTPException

from apps.serve.schema import LoadLora, UnloadLora
from glm.errors import InputError
from glm.serving.engine import Engine


def add_lora_routes(app: FastAPI, engine: Engine, folder: Path) -> None:
    """Loading and unloading of adapters as vLLM 0.28 has it. Nothing outside of `folder` is read."""

    @app.post("/v1/load_lora_adapter", response_class=PlainTextResponse)
    def load(body: LoadLora) -> str:
        path = Path(body.lora_path).resolve()
        if not path.is_relative_to(folder.resolve()):
            raise InputError(f"lora_path: {body.lora_path!a} is not below the folder that this server was given")
        engine.load_lora(body.lora_name, path)
        return f"Success: LoRA adapter '{body.lora_name}' added successfully."

    @app.post("/v1/unload_lora_adapter", response_class=PlainTextResponse)
    def unload(body: UnloadLora) -> str:
        if body.lora_name not in engine.lora_names():
            raise HTTPException(404, f"The lora adapter {body.lora_name!a} cannot be found.")
        engine.unload_lora(body.lora_name)
        return f"Success: LoRA adapter '{body.lora_name}' removed successfully."
