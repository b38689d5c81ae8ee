"""Packed formats of sources, one file each."""
