"""The 7B models of the benchmarks, all but their weights, from published numbers alone.

    python benchmarks/make_models.py                        # all, into .cache/models
    python benchmarks/make_models.py qwen2-vl-7b --out elsewhere
    sparsemm serve .cache/models/llava-1.5-7b --load-format dummy \\
        --additional-config '{"sparsemm": {"profile": ".cache/models/llava-1.5-7b/profile.json"}}'

Needs transformers, torch and this package on the path; no network.
"""

import argparse
from pathlib import Path

from models import FOLDER, NAMES, prepare


def main() -> None:
    parser = argparse.ArgumentParser(description="Write the benchmarks' models without weights.")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(NAMES)}")
    parser.add_argument("--out", type=Path, default=FOLDER, help="folder of the models' folders")
    args = parser.parse_args()
    if unknown := set(args.names) - set(NAMES):
        parser.error(f"no such model: {', '.join(sorted(unknown))}; there are {', '.join(NAMES)}")
    for name in args.names or NAMES:
        print(prepare(name, args.out))


if __name__ == "__main__":
    main()
