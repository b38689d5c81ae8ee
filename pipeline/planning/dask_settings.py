"""Files of Dask's settings that Dask cannot read: without them it cannot even be imported, so that they are looked for before."""

from __future__ import annotations

import os
import site
import sys
from pathlib import Path

from pipeline.errors import Problem


def settings_problems() -> list[Problem]:
    """Return a problem where a file of Dask's settings on this machine is malformed.

    Dask is imported only where there is such a file: a plan does without it.
    """
    if not any(_has_settings(place) for place in _places()):
        return []
    try:
        import dask  # noqa: F401
    except ValueError as error:
        text = " ".join(str(error).split())
        return [Problem("the configuration of Dask", text, "a file of settings in YAML", "Mend it, or move it out of DASK_CONFIG")]
    return []


def _places() -> list[Path]:
    """The files and directories that Dask reads settings from when it is imported (dask.config)."""
    prefixes = [Path(prefix) / "etc/dask" for prefix in dict.fromkeys((sys.prefix, *site.PREFIXES))]
    named = [Path(os.environ["DASK_CONFIG"])] if "DASK_CONFIG" in os.environ else []
    own = Path(os.path.expanduser("~/.config/dask"))  # noqa: PTH111 (as Dask does it, also where nobody knows the home directory)
    return [Path(os.environ.get("DASK_ROOT_CONFIG", "/etc/dask")), *prefixes, own, *named]


def _has_settings(place: Path) -> bool:
    try:
        return place.is_file() or any(each.suffix.lower() in (".yaml", ".yml", ".json") for each in place.iterdir())
    except OSError:
        return False
