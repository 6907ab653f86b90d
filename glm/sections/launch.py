"""The section of params.yaml that says on how many GPUs a training runs."""

from typing import Literal

from pydantic import Field

from glm.sections.section import Section

Strategy = Literal["ddp", "fsdp", "deepspeed_zero3"]


class Launch(Section):
    """The processes of SFT, reward model and policy, one a GPU. Results do not depend on it, but for rounding.

    An optimizer step holds as many examples as the stage's own section says, whatever the number of processes: they
    share it out. So no stage depends on this section, and a checkpoint of two processes is good for one or four.
    """

    num_processes: int = Field(1, ge=1, description="one a GPU; without a GPU, on the CPU")
    strategy: Strategy = Field(
        "ddp",
        description="who holds the weights, gradients and moments of method full in SFT and reward model: each process "
        "all of them (ddp), or its share (fsdp: FSDP2; deepspeed_zero3: DeepSpeed's ZeRO stage 3, needs deepspeed). "
        "Other methods, and policies, always take ddp",
    )
