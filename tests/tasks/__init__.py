"""Tests of ``nemo_apo.tasks``."""
