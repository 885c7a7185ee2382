"""What the documents claim: the scripts that measure it, and their records in results/."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
