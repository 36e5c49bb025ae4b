"""Read files to pixels, and write pixels to GeoTIFF."""
