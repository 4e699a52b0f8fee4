"""A step made faster: replayed as one CUDA graph; and the preflight that tries which way to train is fastest."""
