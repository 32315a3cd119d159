"""Answer requests with a loaded artifact, each row with its adapter; no torch."""
