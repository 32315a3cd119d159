"""What this process runs in: the machine, the libraries' output, PEFT's registry of methods."""
