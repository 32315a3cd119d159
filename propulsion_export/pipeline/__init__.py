"""A module a command: each knows the order of the packages it needs, and they do not."""
