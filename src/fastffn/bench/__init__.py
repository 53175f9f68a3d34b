"""Cases and reports on top of `measure`."""
