"""What a command line tells in a line, without a traceback."""


class FlowError(RuntimeError):
    """Something that a run needs has failed: a stage, a server, git, DVC, a model. The message says all of it."""


class StageError(FlowError):
    """A stage failed or ran out of time. The message ends with the last lines of its output."""


class RefusedError(StageError):
    """A stage refused its input (exit status 2): another try would not help. The message is the stage's own."""


class CommandError(FlowError):
    """A command of git or DVC failed; the message is the command and what it said."""


class ServerError(FlowError):
    """A Prefect server did not start."""


class SmokeTestError(FlowError):
    """A registered model does not load or does not answer."""


class HubError(FlowError):
    """The champion was not sent to the hub."""
