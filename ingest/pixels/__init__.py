"""Pure functions on the pixels of one window: mask, clip, mosaic, composite, indices."""
