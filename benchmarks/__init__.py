"""The benchmark suite: `python -m benchmarks` measures nbray and its peers side by side. See benchmarks/README.md."""
