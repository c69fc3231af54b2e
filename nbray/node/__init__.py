"""The node process: a pure machine and the shell around it."""
