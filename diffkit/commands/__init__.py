"""The commands of `diffkit`, one module each: a config dataclass and `main(config) -> int`."""
