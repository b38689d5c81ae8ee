"""Round trip: compare every value of the rank files with the source's, by an independent reading of both."""
