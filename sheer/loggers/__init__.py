"""Room for loggers."""
