"""Room for callbacks."""
