"""The documents as a site: `make docs`, which writes it to .docs.

Links from a page to a file of the repository, which is no page, lead to a copy of that file; the reference is written anew from the
code at each build (reference.py).
"""

from __future__ import annotations

import sys
from pathlib import Path

DOCS = Path(__file__).resolve().parent
ROOT = DOCS.parent
sys.path[:0] = [str(ROOT), str(DOCS)]

from reference import write_reference  # noqa: E402

import headrace  # noqa: E402

project = "headrace"
release = headrace.__version__
author = "the headrace team"
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "repository_links"]
source_suffix = {".md": "markdown"}
exclude_patterns = ["scheduling", "monitoring"]
html_theme = "furo"
html_title = f"headrace {release}"
html_copy_source = False
html_show_sphinx = False
myst_heading_anchors = 4
myst_links_external_new_tab = False
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
napoleon_google_docstring = False
pygments_style = "friendly"
pygments_dark_style = "native"


write_reference(DOCS / "reference")  # before the pages are looked for
