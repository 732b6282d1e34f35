"""Tests of ``nemo_apo.planning``; bytes are added up by hand, never by the code."""
