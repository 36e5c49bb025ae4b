"""What a finished model is used for: maps of whole scenes, and embeddings."""
