"""Sphinx reads this: `make docs` writes the pages to build/docs. A warning, such as a broken link, ends the build."""

import shutil
from importlib import metadata
from pathlib import Path

# the benchmark writes its tables and pictures where it runs; the pages show a copy
shutil.copytree(Path(__file__).parents[1] / "bench/results", Path(__file__).parent / "results", dirs_exist_ok=True)

project = "prefixloss"
release = version = metadata.version("prefixloss")
extensions = ["myst_parser", "sphinx.ext.autodoc"]
html_theme = "furo"
myst_heading_anchors = 3
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
exclude_patterns = ["conf.py", "pictures.py"]


def as_it_stands(app, what, name, obj, options, lines):
    """Docstrings are plain text, as `help()` shows them."""
    lines[:] = ["::", "", *(f"    {line}" for line in lines), ""]


def setup(app):
    app.connect("autodoc-process-docstring", as_it_stands)
