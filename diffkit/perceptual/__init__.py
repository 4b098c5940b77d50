"""Feature networks and distances between images."""
