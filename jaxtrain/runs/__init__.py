"""What keeps a run: its directory, checkpoints and history, and what may go wrong without ending it."""
