"""What the plugins for NeMo's GRPO trainers share: settings, state, and the RL step's bookkeeping.

A host samples, grades, splits, steps and saves; ``nemo_apo.aligner`` and ``nemo_apo.nemo_rl``
translate between its data and ``nemo_apo.core``. What does not depend on which host it is stands
here.
"""
