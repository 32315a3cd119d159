"""What flows between commands: a directory with one model, its manifest, and its adapters."""
