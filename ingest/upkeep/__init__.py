"""This room grows, refreshes, repairs and compares existing cubes."""
