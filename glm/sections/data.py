"""Section `data`: which datasets feed which stage, and how rows become tokens."""

from typing import Annotated, Any, Literal, Self

from pydantic import Field, PlainValidator, model_validator

from glm.sections.section import Section


def _read_mixture(value: Any) -> list[str] | dict[str, float]:
    """Datasets as a list, as a comma string (the reference's), or with their weights."""
    if isinstance(value, str):
        value = [name.strip() for name in value.split(",") if name.strip()]
    if isinstance(value, list) and all(isinstance(name, str) for name in value):
        twice = sorted({name for name in value if value.count(name) > 1})
        if twice:
            raise ValueError(f"{', '.join(twice)} is named twice")
        return value
    if isinstance(value, dict) and all(isinstance(name, str) for name in value):
        wrong = [name for name, weight in value.items() if type(weight) not in (int, float) or not 0 < weight < 1e9]
        if wrong:
            raise ValueError(f"the weight of {wrong[0]} must be a number above 0 (found {value[wrong[0]]!r})")
        return {name: float(weight) for name, weight in value.items()}
    raise ValueError(f"expected names of datasets, as a list or comma string, or name: weight (found {value!r})")


def _read_needed_mixture(value: Any) -> list[str] | dict[str, float]:
    mixture = _read_mixture(value)
    if not mixture:
        raise ValueError("name at least 1 dataset")
    return mixture


_MIXTURE_INPUT = str | list[str] | dict[str, float]
Mixture = Annotated[list[str] | dict[str, float], PlainValidator(_read_mixture, json_schema_input_type=_MIXTURE_INPUT)]
NeededMixture = Annotated[
    list[str] | dict[str, float], PlainValidator(_read_needed_mixture, json_schema_input_type=_MIXTURE_INPUT)
]


class Data(Section):
    """Which datasets (keys of data/dataset_info.json) feed which stage, and how rows become tokens.

    A stage's datasets are a list, a comma string, or weights, `{alpaca_zh: 0.7, self_cognition: 0.3}`: the shares of
    the training split. Dev and test rows are never weighted, so that they do not change with the mixture.
    """

    dataset_dir: str = "data"
    text: Mixture = Field(["reviews_text"], description="plain text for the embedded base model; else empty")
    sft: NeededMixture = Field(["reviews_sft"])
    reward: Mixture = Field(["reviews_pairs"], description="rankings; empty only where a run ends with SFT")
    ppo: Mixture = Field(["reviews_prompts"], description="prompts of the policy; empty as above")
    kto: Mixture = Field([], description="answers labelled good or bad, for methods that learn from them")
    placeholders: dict[str, str] = Field(
        {}, description="what stands for <NAME> and so on in datasets that have such marks: {NAME: 小智}"
    )
    mix_by: Literal["examples", "tokens"] = Field("examples", description="what weights are shares of")
    mix_strategy: Literal["first_exhausted", "all_exhausted"] = Field(
        "first_exhausted", description="weights leave rows out until they fit, or repeat rows until all are used"
    )
    max_samples: int | None = Field(None, ge=8, description="rows kept per dataset and split, chosen by their hash")
    seed: int = Field(42, ge=0, le=2**32 - 1, description="which rows max_samples and weights choose")
    deduplicate: Literal["none", "exact", "near"] = Field(
        "near", description="near: rows that differ in case, width, blanks or sentence punctuation only count as equal"
    )
    dev_ratio: float = Field(0.05, ge=0, le=0.5)
    test_ratio: float = Field(0.05, gt=0, le=0.5)
    max_source_length: int = Field(512, ge=16, description="tokens of the prompt; old rounds are cut first")
    max_target_length: int = Field(512, ge=4, description="tokens of the answer")
    source_prefix: str = Field("", description="system prompt, joined by a newline in training and in chat alike")

    @model_validator(mode="after")
    def something_left_to_train_on(self) -> Self:
        if self.dev_ratio + self.test_ratio > 0.8:
            raise ValueError(
                f"dev_ratio {self.dev_ratio} + test_ratio {self.test_ratio} leave under 0.2 of the rows to train on"
            )
        return self
