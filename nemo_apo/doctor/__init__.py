"""Is every node of a job fit for a run? Findings with what to do about each, in bounded time.

``findings`` is what a check says, ``place`` where this process stands among the others, ``machine``
the checks of one node, ``meeting`` those between nodes, ``visit`` all of them in order.
"""
