"""Growing, refreshing, healing and comparing a cube that exists."""
