"""Settings of Sphinx. The pages themselves are written by tools/docs.py."""

import configparser
from importlib.resources import files
from pathlib import Path

settings = configparser.ConfigParser()
settings.read(Path(__file__).resolve().parent.parent / "settings.ini", encoding="utf-8")
facts = settings["DEFAULT"]

project = html_title = facts["title"]
author = facts["author"]
copyright = facts["copyright"]
release = facts["version"]
language = "en"

extensions = ["myst_nb", "sphinx.ext.viewcode", "sphinx_copybutton"]
exclude_patterns: list[str] = []

# A name of this package that leads nowhere is an error; names of other packages have no page here.
nitpicky = True
nitpick_ignore_regex = [("py:.*", r"(?!ctxlab\.).*")]

nb_execution_mode = "off"  # the stored outputs are the page
nb_render_markdown_format = "myst"
myst_enable_extensions = ["dollarmath", "amsmath", "colon_fence"]
myst_heading_anchors = 4

python_maximum_signature_line_length = 70
python_use_unqualified_type_names = True
add_module_names = False
html_domain_indices = viewcode_follow_imported_members = False
toc_object_entries_show_parents = "hide"

# One file with its own fonts, from a package: no page asks the network for anything.
html_static_path = ["_static", str(files("mathjax") / "static/mathjax/es5/tex-svg.js")]
mathjax_path = "tex-svg.js"

html_theme = "furo"
pygments_dark_style = "github-dark"
html_css_files = ["site.css"]
html_favicon = "_static/favicon.svg"
html_copy_source = html_show_sourcelink = False
html_theme_options = {
    "light_css_variables": {"color-brand-primary": "#0b5fa5", "color-brand-content": "#0b5fa5"},
    "dark_css_variables": {"color-brand-primary": "#6cb6f0", "color-brand-content": "#6cb6f0"},
}
copybutton_selector = "div.cell_input pre, div.highlight-sh pre"
