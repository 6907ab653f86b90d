"""What every section of params.yaml is."""

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """A mapping of params.yaml whose keys are all known."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)
