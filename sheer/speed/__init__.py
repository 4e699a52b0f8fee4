"""A step made faster: replayed as one CUDA graph."""
