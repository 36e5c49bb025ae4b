"""Labels: rasters and polygons onto a cube, folders of images into sample stores."""
