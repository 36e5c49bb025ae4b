"""What a worker process must be, and what all workers share."""
