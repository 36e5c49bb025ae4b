"""Arithmetic on the pixels of one window, in numpy alone."""
