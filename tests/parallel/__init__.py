"""Tests of ``nemo_apo.parallel``."""
