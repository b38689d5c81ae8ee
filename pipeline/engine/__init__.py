"""Engines: requests that know their checkpoint, the look at a checkpoint before it is built, and the builder's runs."""
