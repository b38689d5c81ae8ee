"""Where a plan's tensors go: rank files, Zarr scratch here or behind a URL, and the journal of what is on disk."""
