"""APO in NeMo-RL: a loss, a policy class, a logger and the launch entry.

Translation only: the arithmetic is in ``nemo_apo.core``, what both NeMo plugins share in
``nemo_apo.plugin``. ``loss`` needs torch and the core alone, because it travels to workers whose
environment is their own.
"""
