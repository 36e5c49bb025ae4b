"""This folder grows, refreshes, repairs and compares existing cubes."""
