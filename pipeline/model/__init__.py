"""Models as data: the tables of `configs/`, a model's configuration, and the types and sizes that follow from it."""
