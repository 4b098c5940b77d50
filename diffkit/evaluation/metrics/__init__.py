"""Metrics of pictures and of picture sets, see `registry`."""
