"""Room for checkpoint."""
