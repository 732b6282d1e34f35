"""APO in NeMo-Aligner: an actor mixin, a GRPO trainer, and the launch entry.

Translation only: the arithmetic is in ``nemo_apo.core``. What is read of the host is checked by
``interface_guard`` when the modules that subclass its classes (``grpo``, ``released``) are
imported; the others import neither nemo nor megatron.
"""
