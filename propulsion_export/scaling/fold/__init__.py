"""Multiply an adapter into the weights of its base model.

`model` folds into a loaded model, `checkpoint` into a checkpoint on disk: `source` reads it,
`stored` maps its tensors to the model's parameters, `shards` writes the result. Both refuse or undo
`ties`.
"""
