"""How much a protection does against each use of a picture, and what purification leaves of it."""
