"""How Sphinx builds the pages: `make docs`, every warning an error."""

import lightning_prune

project = "lightning-prune"
author = "The lightning-prune authors"
version = release = lightning_prune.__version__

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
# Tables that the README.md beside them describes.
exclude_patterns = ["_build", "evidence/*/[a-z]*.md", "evidence/*/*/*.md"]
myst_enable_extensions = ["deflist", "dollarmath"]
myst_heading_anchors = 3
nb_execution_mode = "off"  # `make notebook` runs it

autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
napoleon_google_docstring = True
napoleon_numpy_docstring = False

html_theme = "furo"
html_title = f"lightning-prune {version}"
