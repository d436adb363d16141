"""Never run: mypy reads here what the code of a user would see of the package."""

from typing import assert_type

import ctxlab

context = ctxlab.SharedAttentionContext(0.5, workspace=ctxlab.Workspace(debug=True))
assert_type(context, ctxlab.context.SharedAttentionContext)
assert_type(ctxlab.Workspace(), ctxlab.workspace.Workspace)
assert_type(ctxlab.DerivedValue(float).get(), float)
# Where a checker believes in every name, this comment is unused, which mypy reports.
ctxlab.Worksapce  # type: ignore[attr-defined]  # noqa: B018
