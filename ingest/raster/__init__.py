"""From files to pixels, and from pixels to GeoTIFF."""
