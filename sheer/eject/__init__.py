"""`sheer eject`: the library's own loop, specialised for one script's settings and written into the script."""
