"""Destinations of a plan's tensors: rank files, Zarr scratch on a local disk or behind a URL, and the journal of finished tasks."""
