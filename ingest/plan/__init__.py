"""From scenes to one task per shard; nothing here writes."""
