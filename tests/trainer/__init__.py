"""Tests of ``nemo_apo.trainer``."""
