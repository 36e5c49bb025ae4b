"""One step of training: the task of a network, its loss, and the update by the optimiser."""
