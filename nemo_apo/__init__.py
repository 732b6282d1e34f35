"""APO (Alpha-Divergence Preference Optimization) for Megatron-scale reinforcement learning.

``nemo_apo.core`` is the algorithm in plain torch; the other subpackages plug it into hosts.
"""

__version__ = "0.1.0"
