"""Engines: requests with the identity of their checkpoint, checks before a build, and runs of the builder."""
