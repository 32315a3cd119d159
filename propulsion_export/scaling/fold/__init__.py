"""Multiply an adapter into the weights of its base model.

`model` folds into a loaded model. For a checkpoint on disk, which `merging/` writes, `stored` maps
its tensors to the model's parameters and `listing` lists them as `jobs`. Both refuse or undo
`ties`.
"""
