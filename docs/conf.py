"""Sphinx: `python -m sphinx -W docs build/docs`; warnings are errors (tests/unit/test_docs.py)."""

project = "bmtrain_ms"
author = "the bmtrain_ms developers"
copyright = "the bmtrain_ms developers"

extensions = ["sphinx.ext.autodoc", "sphinx.ext.napoleon", "myst_parser"]
source_suffix = {".md": "markdown"}
exclude_patterns = ["build", "examples", "README.zh.md"]  # the last is for the repository's page, as README.md
html_theme = "furo"

default_role = "code"  # docstrings write `name`, as Markdown does
autodoc_default_options = {"members": True, "show-inheritance": True}
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_inherit_docstrings = False
napoleon_numpy_docstring = False
napoleon_use_ivar = True
myst_heading_anchors = 3
