"""`accelerate launch scripts/train_denoising.py --flags` is `diffkit train denoising --flags`."""

import sys

from diffkit.cli import main

if __name__ == "__main__":
    sys.exit(main(["train", "denoising", *sys.argv[1:]]))
