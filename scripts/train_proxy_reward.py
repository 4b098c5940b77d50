"""`diffkit train proxy_reward` for `accelerate launch`, with the same flags."""

import sys

from diffkit.cli import main

if __name__ == "__main__":
    sys.exit(main(["train", "proxy_reward", *sys.argv[1:]]))
