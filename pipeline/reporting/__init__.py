"""Look at finished outputs: their verification, tables for a terminal, and the HTML report."""
