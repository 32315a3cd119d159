"""The frozen model: what its files say (no torch), and the model itself (torch).

`tasks` is the one table of tasks. `config`, `tokenizer`, `positions`, `special_tokens`, `hub` and
`fingerprint` read files; `loading` and `model_fingerprint` load torch.
"""
