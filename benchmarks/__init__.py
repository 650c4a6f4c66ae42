"""Benchmarks: asv's (bench_*.py) and programs run by path, which find their neighbours by plain names under asv too."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parent))
