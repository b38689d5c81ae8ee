"""Round trip: every value of the rank files against the source's, by an independent reading of both."""
