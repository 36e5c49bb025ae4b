"""One step of learning: what is asked of a network, what its answer costs, and how the optimiser changes it."""
