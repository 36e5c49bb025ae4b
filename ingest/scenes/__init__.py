"""From a catalogue to scenes: search, read and harmonise STAC items."""
