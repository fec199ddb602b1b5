"""How long `import sansmax` takes beyond the torch and timm that it needs.

    python -m benchmarks.import_time

The median over fresh interpreters, printed and not written: it says more of the disk than of the package.
"""

import argparse
import json
import statistics
import subprocess
import sys

CHILD = """
import json, time
start = time.perf_counter()
import torch, timm
middle = time.perf_counter()
import sansmax
print(json.dumps([middle - start, time.perf_counter() - middle]))
"""


def measure(repeats: int) -> tuple[float, float]:
    """Median seconds of importing torch and timm, and of importing sansmax after them."""
    pairs = []
    for _ in range(repeats):
        done = subprocess.run([sys.executable, "-c", CHILD], capture_output=True, text=True, check=True)
        pairs.append(json.loads(done.stdout))
    libraries, ours = zip(*pairs, strict=True)
    return statistics.median(libraries), statistics.median(ours)


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5, help="fresh interpreters")
    arguments = parser.parse_args()
    # the first one reads the files from the disk
    measure(1)
    libraries, ours = measure(arguments.repeats)
    print(f"import torch, timm   {libraries:.3f} s")
    print(f"import sansmax       {ours:.3f} s more")


if __name__ == "__main__":
    main()
