"""Measurements of speed, memory and error: what ``nemo-apo bench`` runs.

``logprobs`` compares the log-prob kernel with other ways to the same numbers and with the matrix
products that none of them can do without; ``step`` times the trainer's optimizer steps.
"""
