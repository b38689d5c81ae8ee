"""Finished outputs looked at: verification, tables for a terminal, and the HTML page."""
