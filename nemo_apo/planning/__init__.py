"""What a training layout costs a GPU, on paper: pure arithmetic, nothing is measured.

``settings`` reads what is asked, ``shapes`` counts parameters, ``layout`` divides the model over
GPUs or refuses, ``activations``, ``memory`` and ``communication`` add up bytes, ``plan`` checks a
layout or proposes one, ``tables`` makes the tables of ``docs/scaling.md``.

Sizes are bytes, and 1 GB is 10^9 of them.
"""
