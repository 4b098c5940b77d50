"""Image folders, captions, prompts, buckets, sampling order and caches."""
