"""Where a step's time goes: `sheer profile`."""
