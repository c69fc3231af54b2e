"""The benchmark suite: `python -m benchmarks.run` measures nbray and its peers side by side. See benchmarks/README.md."""
