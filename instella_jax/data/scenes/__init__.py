"""The embedded world of emoji scenes."""
