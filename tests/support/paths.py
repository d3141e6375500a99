"""Folders of the checkout."""

from pathlib import Path

ROOT = Path(__file__).parents[2]
TESTS = ROOT / "tests"
BENCHMARKS = ROOT / "benchmarks"
GOLDEN = ROOT.parent / "shared" / "golden"  # beside the checkout; tests that need it skip without
