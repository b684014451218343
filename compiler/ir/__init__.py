"""The values that pass between the parts of the compiler, and nothing that decides or executes."""
