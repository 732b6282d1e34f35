"""Tests of ``nemo_apo.core``; oracles are written from the equations, never from the code."""
