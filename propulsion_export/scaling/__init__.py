"""A scale on a layer: attached to a torch model, for one adapter or for each row, or folded in."""
