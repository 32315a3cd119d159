"""Rows of data files and data sets: the one reader that training, `run` and `parity` share."""
