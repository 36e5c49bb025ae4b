"""From scenes to one task per shard; no pixel is stored here."""
