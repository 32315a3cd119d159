"""Package an artifact's files in the layouts that servers load."""
