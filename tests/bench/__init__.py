"""Tests of ``nemo_apo.bench``: what it reports, never how fast."""
