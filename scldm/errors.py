"""The one exception that a user is meant to read."""


class InputError(ValueError):
    """What was given can't be used: the message is one line that names the thing, the value and what would be right.

    The command line prints it without a traceback and exits with code 2.
    """
