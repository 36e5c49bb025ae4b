"""Grow, refresh, repair and compare existing cubes."""
