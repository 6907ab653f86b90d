"""What clients may send, OpenAI's fields. Those that would change the answer and are not supported are refused."""

from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, model_validator

MOST_LOGPROBS = 20
Text = Annotated[str, StringConstraints(max_length=1_000_000)]
StopText = Annotated[str, StringConstraints(min_length=1, max_length=256)]
Name = Annotated[str, StringConstraints(min_length=1, max_length=256)]


class Body(BaseModel):
    model_config = ConfigDict(allow_inf_nan=False, extra="ignore")


class Function(Body):
    name: Name
    arguments: Text


class Call(Body):
    id: str = ""
    type: Literal["function"] = "function"
    function: Function


class TextPart(Body):
    type: Literal["text"]
    text: Text


class Message(Body):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Text | list[TextPart] | None = None
    tool_calls: list[Call] | None = None

    def for_template(self) -> dict[str, Any]:
        """As the chat templates know it: text alone, and no role `developer`."""
        content = self.content
        if isinstance(content, list):
            content = "".join(part.text for part in content)
        message: dict[str, Any] = {"role": "system" if self.role == "developer" else self.role, "content": content}
        if self.tool_calls:
            message["tool_calls"] = [call.model_dump() for call in self.tool_calls]
        return message


class ToolFunction(BaseModel):
    model_config = ConfigDict(extra="allow", allow_inf_nan=False)
    name: Name
    description: Text | None = None
    parameters: dict[str, Any] | None = None


class Tool(Body):
    type: Literal["function"] = "function"
    function: ToolFunction


class StreamOptions(Body):
    include_usage: bool = False


class Sampling(Body):
    """What both ways of asking have in common."""

    model: Name = Field(description="a name that /v1/models lists")
    temperature: float | None = Field(None, ge=0, le=10, description="0: always the most probable token")
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=0, le=1_000_000, description="not in OpenAI's interface; 0: all")
    n: int = Field(1, ge=1, le=16)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stop: StopText | Annotated[list[StopText], Field(max_length=4)] | None = None
    max_tokens: int | None = Field(None, ge=1, le=1_000_000)
    stream: bool = False
    stream_options: StreamOptions | None = None
    presence_penalty: Literal[0] | Annotated[float, Field(ge=0, le=0)] | None = Field(None, description="0 only")
    frequency_penalty: Literal[0] | Annotated[float, Field(ge=0, le=0)] | None = Field(None, description="0 only")
    logit_bias: Annotated[dict[str, float], Field(max_length=0)] | None = Field(None, description="not supported")
    # Not in OpenAI's interface; other servers know them.
    min_p: Literal[0] | Annotated[float, Field(ge=0, le=0)] | None = Field(None, description="0 only")
    repetition_penalty: Literal[1] | Annotated[float, Field(ge=1, le=1)] | None = Field(None, description="1 only")

    def stops(self) -> tuple[str, ...]:
        """The texts that end the answer."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())


class ChatRequest(Sampling):
    messages: Annotated[list[Message], Field(min_length=1, max_length=10_000)]
    max_completion_tokens: int | None = Field(None, ge=1, le=1_000_000)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=MOST_LOGPROBS)
    tools: Annotated[list[Tool], Field(max_length=128)] | None = None
    tool_choice: Literal["auto", "none"] | None = None
    functions: None = Field(None, description="not supported; tools are what came after them")
    response_format: dict[Literal["type"], Literal["text"]] | None = Field(None, description="text only")

    @model_validator(mode="after")
    def alternatives_need_logprobs(self) -> Self:
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs: true")
        return self


Tokens = Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1, max_length=1_000_000)]


class CompletionRequest(Sampling):
    prompt: (
        Text
        | Annotated[list[Text], Field(min_length=1, max_length=64)]
        | Tokens
        | Annotated[list[Tokens], Field(min_length=1, max_length=64)]
    )
    logprobs: int | None = Field(None, ge=0, le=MOST_LOGPROBS)
    echo: Literal[False] | None = Field(None, description="not supported")
    suffix: None = Field(None, description="not supported")
    best_of: Literal[1] | None = Field(None, description="1 only")
    # Not in OpenAI's interface; as in vLLM 0.28, for those who work with tokens.
    stop_token_ids: Annotated[list[Annotated[int, Field(ge=0)]], Field(max_length=64)] | None = Field(
        None, description="tokens that end the answer, beside the model's own"
    )
    ignore_eos: bool = Field(False, description="the model's own end tokens do not end the answer")
    return_token_ids: bool | None = Field(
        None, description="with the answer's token_ids (end token included) and prompt_token_ids"
    )
    return_tokens_as_token_ids: bool | None = Field(None, description="tokens in logprobs are written token_id:ID")


class UnloadLora(Body):
    lora_name: Name


class LoadLora(UnloadLora):
    lora_path: Name = Field(description="folder of an adapter in PEFT's format, as this server sees it")


class Feedback(Body):
    """One of: a thumb (`label`), the better of two answers (`chosen`, `rejected`), a `ranking`, a `better` text."""

    id: Name = Field(description="of the answer, as the server gave it")
    index: int = Field(0, ge=0, le=1000, description="of the choice that `label` or `better` is about")
    label: bool | None = Field(None, description="true: good, false: bad")
    chosen: int | None = Field(None, ge=0, le=1000, description="number of a choice")
    rejected: int | None = Field(None, ge=0, le=1000)
    ranking: Annotated[list[Annotated[int, Field(ge=0, le=1000)]], Field(min_length=2, max_length=100)] | None = Field(
        None, description="numbers of choices, the best first"
    )
    better: Annotated[str, StringConstraints(min_length=1, max_length=1_000_000)] | None = Field(
        None, description="what the answer should have been"
    )
    comment: Annotated[str, StringConstraints(max_length=10_000)] = ""

    @model_validator(mode="after")
    def one_kind(self) -> Self:
        pair = (self.chosen is None) + (self.rejected is None)
        if pair == 1 or (pair == 2) + (self.label is None) + (self.better is None) + (self.ranking is None) != 3:
            raise ValueError("give one of: label; chosen and rejected; ranking; better")
        return self
