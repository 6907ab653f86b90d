"""The one exception for faults that the user can mend."""


class InputError(ValueError):
    """A parameter, file or row is wrong.

    The message is one line that names the field or file, the value found, and what would be right. Programs print it
    without a traceback and exit with status 2; nothing has been written when it is raised.
    """
