"""Talking to a server that speaks vLLM's HTTP interface: vLLM, or `glmflow serve`."""

from typing import Any

import httpx

from glm.errors import InputError

PATIENCE = httpx.Timeout(300.0, connect=10.0)  # seconds without a byte: vLLM has a queue of its own
# A server may have defaults of its own from the model's generation_config.json. These switch them off (0: all tokens).
NO_DEFAULTS = {"top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0}


class RemoteError(RuntimeError):
    """The other server refused, or answered something else than was agreed."""


def open_client(url: str, api_key: str | None, connections: int) -> httpx.Client:
    """A client for so many requests at once; proxies of the environment are not asked."""
    return httpx.Client(
        base_url=url.rstrip("/").removesuffix("/v1"),
        headers={"authorization": f"Bearer {api_key}"} if api_key else {},
        timeout=PATIENCE,
        limits=httpx.Limits(max_connections=connections),
        trust_env=False,
    )


def served_model(client: httpx.Client) -> dict[str, Any]:
    """The server's model as /v1/models describes it; adapters, which name a `parent`, are left out.

    Raises:
        InputError: nothing answers there, or not as such a server does.
    """
    try:
        response = client.get("/v1/models")
        check_status(response)
        return next(model for model in response.json()["data"] if not model.get("parent"))
    except (httpx.HTTPError, RemoteError, ValueError, KeyError, StopIteration) as error:
        raise InputError(f"{client.base_url}: no OpenAI-compatible server with a model answers: {error!r}") from None


def check_status(response: httpx.Response) -> None:
    """Raise RemoteError with the server's own words for any status but 200."""
    if response.status_code != 200:
        response.read()
        raise RemoteError(f"status {response.status_code}: {response.text[:500]}")
