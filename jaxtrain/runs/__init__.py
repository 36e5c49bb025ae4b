"""The record of a run: directory, checkpoints and history, and faults that do not end it."""
