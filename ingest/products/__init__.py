"""What a finished map becomes in other programs: polygons, tiles of web maps, descriptions for catalogues."""
