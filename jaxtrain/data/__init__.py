"""From a cube to batches on the mesh: classes → splits → windows → order → batches → (on the device) augment."""
