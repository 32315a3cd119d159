"""The machine, the output of libraries, progress, and the registration with PEFT."""
