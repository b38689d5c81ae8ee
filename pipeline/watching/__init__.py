"""Watch a conversion while it runs: its state, and the page, the metrics and the server that show it."""
