"""Write the checkpoint of a base model with an adapter folded in, at the speed of the disk.

`changes` says what becomes of each stored tensor, `products` computes, `quantised/` knows the
layouts of quantised checkpoints, `gguf/` GGUF files. No torch.
"""
