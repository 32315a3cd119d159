"""Multiply an adapter into the weights of its base model.

`model` folds into a loaded model, `checkpoint` into one on disk, which `shards` writes.
"""
