"""What `protection.py` is made of: an artist, attacks on the artist's pictures, and measures."""
