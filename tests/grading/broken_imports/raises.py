"""A grader that cannot be imported."""

raise RuntimeError("cannot be imported")
