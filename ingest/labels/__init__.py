"""Put rasters and polygons onto a cube as labels, and labelled images into sample stores."""
