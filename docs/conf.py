"""How Sphinx builds the pages: `make docs`, every warning an error."""

import inspect
import sys

import latex2mathml.converter
from docutils.nodes import SkipNode

import lightning_prune

project = "lightning-prune"
author = "The lightning-prune authors"
version = release = lightning_prune.__version__

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
]
# Tables that the README.md beside them describes.
exclude_patterns = ["_build", "evidence/*/[a-z]*.md", "evidence/*/*/*.md"]
templates_path = ["_templates"]
default_role = "py:obj"  # `Ridge` in a docstring is a link
myst_enable_extensions = ["deflist", "dollarmath"]
myst_heading_anchors = 3
myst_update_mathjax = False
html_math_renderer = "mathml"  # what browsers draw themselves: nothing is fetched from elsewhere
nb_execution_mode = "off"  # `make notebooks` runs them
nb_render_markdown_format = "gfm"

autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
napoleon_google_docstring = True
napoleon_numpy_docstring = False

html_theme = "furo"
html_title = f"lightning-prune {version}"
html_show_search_summary = False  # a browser fetches them, which it refuses for pages that are files

# The sidebar. In index.md GitHub would show it as code.
NAVIGATION = {
    "Start": ["quickstart", "choosing", "how_to", "coming_from", "gallery"],
    "Tutorials": [
        "tutorials/prune_while_training",
        "tutorials/prune_a_pretrained_network",
        "tutorials/transfer_by_xgb",
        "tutorials/parameter_budget",
        "tutorials/study",
        "tutorials/masks",
    ],
    "Methods": ["callbacks", "criteria", "masks", "transfer", "xgb", "spvr", "study", "controls", "own_methods"],
    "Reference": [
        "api/index",
        "architectures",
        "companions",
        "checkpoints",
        "deploy",
        "hugging_face_and_timm",
        "wandb",
        "recipes",
        "messages",
        "glossary",
        "papers",
    ],
    "Evidence": ["evidence/*/README"],
}


def add_navigation(app, docname, source):
    if docname == "index":
        for caption, pages in NAVIGATION.items():
            listed = "\n".join(pages)
            source[0] += f"\n```{{toctree}}\n:hidden:\n:glob:\n:caption: {caption}\n\n{listed}\n```\n"


def is_documented_elsewhere(app, what, name, member, skip, options):
    """Members that a base class has are explained there: Lightning's hooks, the `score` of every criterion."""
    function = getattr(member, "fget", member)
    owner, _, member_name = getattr(function, "__qualname__", "").rpartition(".")
    owner = getattr(sys.modules.get(getattr(function, "__module__", None)), owner, None)
    if inspect.isclass(owner) and any(member_name in vars(base) for base in owner.__mro__[1:]):
        return True
    return skip


def write_formula(display):
    def visit(translator, node):
        latex = node.astext().replace(r"\arg", r"\mathrm{arg}\,")
        translator.body.append(latex2mathml.converter.convert(latex, display=display))
        raise SkipNode

    return visit, None


def setup(app):
    app.add_html_math_renderer("mathml", write_formula("inline"), write_formula("block"))
    app.connect("source-read", add_navigation)
    app.connect("autodoc-skip-member", is_documented_elsewhere)
