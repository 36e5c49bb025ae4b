"""Worker processes: their checks, and the limits and counters that they share."""
