"""The traced graph: made, changed by passes, written, read, compared with a manifest."""
