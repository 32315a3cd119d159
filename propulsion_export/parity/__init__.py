"""The verdict: does an artifact compute what the trained PyTorch model computes?

`comparison` holds the one tolerance formula, `cases` what is compared with what, `reports` the
verdict as JSON, HTML and JUnit XML.
"""
