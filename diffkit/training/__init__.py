"""The harness: configuration, trainer, checkpoints, EMA, trackers."""
