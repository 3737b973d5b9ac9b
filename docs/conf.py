"""Sphinx builds these pages: `sphinx-build -W docs docs/_build`. Tutorials are executed."""

import os
import re
from importlib import metadata

os.environ.pop("MPLBACKEND", None)  # a kernel then shows figures in the page

project = "scldm"
author = copyright = "the scldm authors"
release = version = metadata.version("scldm")
extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
]
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = f"scldm {release}"

myst_enable_extensions = ["colon_fence", "dollarmath"]
myst_heading_anchors = 3

nb_execution_mode = "cache"
nb_execution_timeout = 600
nb_execution_raise_on_error = True
nb_merge_streams = True

autodoc_typehints = "description"
autodoc_member_order = "bysource"
autodoc_default_options = {"members": True, "undoc-members": False}


def fields(app, what, name, obj, options, lines: list[str]) -> None:
    """Docstrings name an argument as `name: what it is`, and errors as `Raises: ...`. Sphinx has fields for both."""
    found: list[str] = []
    for line in lines:
        if match := re.match(r"(\w+(?:, \w+)*): (.+)", line):
            names, text = match.groups()
            field = "raises" if names == "Raises" else f"param {names}" if names[0].islower() else ""
            if field and found and found[-1] and not found[-1].startswith((":", " ")):
                found.append("")
            found.append(f":{field}: {text}" if field else line)
        elif found and found[-1].startswith((":", " ")) and line and not line.startswith(" "):
            found += [f"    {line}"]  # goes on with the field
        else:
            found.append(line)
    lines[:] = found


def setup(app) -> None:
    app.connect("autodoc-process-docstring", fields)
