"""The verdict: does an artifact compute what the trained PyTorch model computes?

`comparison` holds the one tolerance formula, `cases` what is compared with what, `report` the
verdict and its JSON, `html` (with `picture`) and `junit` its other forms.
"""
