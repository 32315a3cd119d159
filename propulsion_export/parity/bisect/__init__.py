"""Where a failing artifact first leaves its tolerance: the module, its channels, its multiply."""
