"""The road, one verb a module: each knows the order of the stages it needs, and no stage does.

`merging`, `exporting`, `building`, `verifying`, `predicting` and `adapters` are the commands'
functions; `road` strings them together; `inputs` is what they start with, `running` picks
runners, `oracle` is what PyTorch says, `agreeing` holds a manifest against its graph,
`making` makes graphs, `describing` turns outputs into answers.
"""
