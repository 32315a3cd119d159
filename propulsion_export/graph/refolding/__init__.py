"""Fold an adapter into the graphs of an artifact, without a trace and without the torch model.

`unpacking` takes the packed inputs of a switchable graph apart, `modules` puts scales behind the
modules of a base model's graph, `weights` multiplies them into the weights, `programs` does all of
it for the graphs of an artifact, `heads` gives them as many labels as the adapter has.
"""
