"""A process in which only some packages can be found, as in an environment that has no others."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

# run by Python itself when it starts, in all processes that inherit PYTHONPATH
SITE = '''
import sys

SHOWN, HIDDEN = {shown!r}, {hidden!r}


class Some:
    """A finder, but for the packages that are hidden; `find_spec` of those is None, as where they are not installed."""

    def __init__(self, finder):
        self.finder = finder

    def find_spec(self, name, path=None, target=None):
        top = name.partition(".")[0]
        of_python = top in sys.stdlib_module_names or top.startswith("_sysconfigdata")
        if top in HIDDEN or (SHOWN and top not in SHOWN and not of_python):
            return None
        return self.finder.find_spec(name, path, target)

    def __getattr__(self, name):
        return getattr(self.finder, name)


sys.meta_path[:] = [Some(finder) for finder in sys.meta_path]
'''


def hide(folder: Path, shown: Collection[str] = (), hidden: Collection[str] = ()) -> str:
    """What PYTHONPATH must begin with to hide packages: `hidden`, and all but `shown` where that is given."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "sitecustomize.py").write_text(SITE.format(shown=set(shown), hidden=set(hidden)))
    return str(folder)
