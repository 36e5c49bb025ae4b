"""Use a finished model: maps of whole scenes, and embeddings."""
