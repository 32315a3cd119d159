"""One module a layout in which quantised checkpoints store a linear layer."""
