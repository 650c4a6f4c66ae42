"""Sphinx settings: `sphinx-build -W --keep-going -b html docs docs/_build`, which needs no network."""

import globe

project = "GloBE"
author = "The GloBE authors"
project_copyright = author
release = version = globe.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
myst_enable_extensions = ["amsmath", "dollarmath"]
myst_heading_anchors = 3
napoleon_google_docstring = False
napoleon_use_rtype = False
autodoc_member_order = "bysource"
autodoc_typehints = "none"  # the docstrings state types and shapes
default_role = "code"
exclude_patterns = ["_build"]

html_theme = "furo"
html_title = f"GloBE {release}"
