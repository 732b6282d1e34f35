"""The algorithm in plain torch: no distributed calls, no framework, group tensors in float64.

Axis legend, used as suffixes of tensor names throughout the package:

    N   sequences (completions) of a batch, flat; each carries a group id
    G   groups (prompts) of a batch
    P   completions of one group (its size; groups may be ragged)
    B   sequences of a micro-batch
    T   tokens of a sequence, padded
    V   vocabulary

The data flow is *weigh, split, sum*: everything that couples completions is settled on float64
scalars of the global optimizer-step batch (``Objective.weigh``), and what crosses into a
micro-batch is a few columns of numbers per sequence, so that its loss is a plain sum over tokens
(``Objective.token_loss``).
"""
