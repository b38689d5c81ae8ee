"""Tests of pipeline/watching."""
