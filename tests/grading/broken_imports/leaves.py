"""A grader whose import leaves Python."""

raise SystemExit(0)
