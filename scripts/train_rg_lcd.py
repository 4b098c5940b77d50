"""`diffkit train rg_lcd` for `accelerate launch`, with the same flags."""

import sys

from diffkit.cli import main

if __name__ == "__main__":
    sys.exit(main(["train", "rg_lcd", *sys.argv[1:]]))
