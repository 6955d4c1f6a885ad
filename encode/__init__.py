"""Stage 1: videos and captions become entries in the cache."""
