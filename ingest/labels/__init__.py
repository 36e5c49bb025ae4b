"""This folder puts rasters and polygons onto a cube as labels, and images with labels into sample stores."""
