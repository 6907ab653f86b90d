"""What each step of the pipeline does: read params.yaml and inputs, call glm, write outputs, log to MLflow.

A step is a program, `python -m tasks.<step>`; `dvc.yaml` says what it reads and writes. No algorithm lives here.
"""

from collections.abc import Sequence

from glm.errors import InputError

# In the order they run.
STEPS = (
    "fetch",
    "preprocess",
    "base",
    "sft",
    "evaluate_sft",
    "reward",
    "reward_judge",
    "policy",
    "evaluate",
    "export",
)


def programs(algorithm: str, steps: Sequence[str] = STEPS) -> tuple[str, ...]:
    """The program of each step, tasks/<program>.py, after which what it writes is named too (metrics/ppo.json).

    It has the step's name, but for the step `policy`, whose program is the `algorithm` of params.yaml.
    """
    return tuple(algorithm if step == "policy" else step for step in steps)


def steps_to(until: str | None) -> list[str]:
    """The steps up to `until`, and all of them without it.

    Raises:
        InputError: there is no such step.
    """
    if until not in (None, *STEPS):
        raise InputError(f"until: {until!r} is no step of the pipeline; it has {', '.join(STEPS)}")
    return list(STEPS[: STEPS.index(until) + 1] if until else STEPS)
