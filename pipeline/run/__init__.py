"""How a plan runs: its Dask tasks, the schedulers, and one rank in memory for the loaders."""
