"""Making pictures from a model: recipes, schedulers, batches, contact sheets."""
