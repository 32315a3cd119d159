"""Each runtime as a callable from tensors to tensors; `table` lists them."""
