"""Watching a conversion while it runs: what it has done so far, the page, the metrics and the server that show it."""
