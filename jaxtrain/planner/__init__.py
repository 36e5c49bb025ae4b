"""What every way of spreading a network costs, and which to take."""
