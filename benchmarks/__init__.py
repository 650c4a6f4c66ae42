"""Speed and memory: asv benchmarks (bench_*.py), and scripts that compare with others."""
