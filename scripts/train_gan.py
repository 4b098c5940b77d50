"""`diffkit train gan` for `accelerate launch`, with the same flags."""

import sys

from diffkit.cli import main

if __name__ == "__main__":
    sys.exit(main(["train", "gan", *sys.argv[1:]]))
