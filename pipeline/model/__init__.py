"""Models as data: the tables of `configs/`, what a configuration says, and the types and sizes that follow from it."""
