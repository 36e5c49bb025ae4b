"""Export of a finished map: polygons, and tiles of web maps."""
