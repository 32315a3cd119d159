"""How many planted mistakes parity catches; `make mutation` runs it.

| module | holds |
|---|---|
| `toys` | the artifacts that mistakes are planted in, by architecture, mode and precision |
| `planted` | a copy of an artifact, to be changed and written with digests that are right again |
| `mistakes` | one kind of mistake, and the places that it can be planted in |
| `weights`, `inputs`, `nodes`, `outputs`, `adapters`, `quantised`, `files` | the kinds |
| `baselines` | the clean artifacts, kept while their sources are the same |
| `stamps` | digests of what artifacts and results are made by |
| `sampling` | which places of each kind are taken |
| `remembering` | PyTorch's side, computed once for all copies of an artifact |
| `visible` | how far a mistake moves what a user sees, on inputs of its own |
| `judging` | the verdict on one copy |
| `running` | all of it, in one process, to be continued where it was interrupted |
| `results` | the runs, on disk as they come |
| `report` | the tables and the gate |
"""
