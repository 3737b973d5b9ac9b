"""The one exception that a user is meant to read, and JSON files read with it. Reading order: InputError, read_json."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


class InputError(ValueError):
    """What was given can't be used: the message is one line that names the thing, the value and what would be right.

    The command line prints it without a traceback and exits with code 2.
    """


def read_json(path: Path) -> Any:
    """What a JSON file holds. Raises: InputError for a file that is missing or no JSON."""
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        raise InputError(f"{path} is missing") from None
    except ValueError as error:  # UnicodeDecodeError and JSONDecodeError
        raise InputError(f"{path} is damaged: not JSON ({error})") from None
