"""The command line: a table of commands, errors turned into exit codes.

Exit codes: 0 done, 1 some items or the run failed, 2 could not start, 130 interrupted.
"""

from __future__ import annotations

import os
import sys
import traceback
import warnings
from collections.abc import Sequence
from importlib import import_module
from typing import NamedTuple

from diffkit import __version__
from diffkit.console import set_quiet
from diffkit.errors import RunFailed, UserError

__all__ = ["COMMANDS", "Command", "main"]


class Command(NamedTuple):
    """Where a command lives and the line that the top-level help shows for it."""

    module: str
    summary: str


COMMANDS: dict[str, Command] = {
    "generate": Command("diffkit.commands.generate", "make pictures from prompts or pictures"),
    "evaluate": Command("diffkit.commands.evaluate", "measure pictures, compare models"),
    "protect": Command(
        "diffkit.commands.protect", "make imitation of pictures harder, say what it cost"
    ),
    "audit": Command("diffkit.commands.audit", "measure what a protection is worth"),
    "info": Command("diffkit.commands.info", "show a model's parts, sizes, schedule and cost"),
    "demo": Command("diffkit.commands.demo", "write one page that shows what diffkit does"),
    "data": Command("diffkit.commands.data", "look after a folder of training pictures"),
    "trajectories": Command(
        "diffkit.commands.trajectories", "make noise-image pairs of a teacher, for train gan"
    ),
    "train": Command("diffkit.commands.train", "fine-tune a model (train OBJECTIVE)"),
    "lora": Command("diffkit.commands.lora", "merge, convert and look at LoRA files"),
    "push": Command("diffkit.commands.push", "upload a saved model or LoRA to the hub"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run `diffkit` with these words (default: those of the process) and return the exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in words
    words = [word for word in words if word != "--debug"]
    try:
        return _dispatch(words, debug)
    except (UserError, RunFailed) as error:
        if debug:
            traceback.print_exc()
        print(f"diffkit: {error}", file=sys.stderr)
        return 2 if isinstance(error, UserError) else 1
    except KeyboardInterrupt:
        if debug:
            traceback.print_exc()
        print("diffkit: interrupted; what was finished is kept.", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader of our output has left; nothing more may be written, not even at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else 0
    except Exception as error:
        if debug:
            traceback.print_exc()
        kind = type(error).__name__
        print(f"diffkit: {kind}: {error}\nAdd --debug for the traceback.", file=sys.stderr)
        return 1
    finally:
        set_quiet(False)  # --json of this command is not that of the next in this process


def _dispatch(words: list[str], debug: bool) -> int:
    if not words or words[0] in ("-h", "--help", "help"):
        print(_help())
        return 0
    if words[0] == "--version":
        print(f"diffkit {__version__}")
        return 0
    name, rest = words[0], words[1:]
    if name not in COMMANDS:
        raise UserError(f"{name}: no such command. {_near(name, COMMANDS)}\nSee diffkit --help.")
    if not debug:
        _hush_libraries()
    return _run(name, rest)


def _run(name: str, words: list[str]) -> int:
    from diffkit.commands.flags import parse_flags

    module = import_module(COMMANDS[name].module)
    configs: dict[str, type] = module.configs()
    prog = f"diffkit {name}"
    word = ""
    if "" not in configs:
        if not words or words[0] in ("-h", "--help"):
            print(_group_help(prog, configs))
            return 0 if words else 2
        word, words = words[0], words[1:]
        if word not in configs:
            raise UserError(f"{prog} {word}: no such command. {_near(word, configs)}")
        prog = f"{prog} {word}"
    parse = getattr(module, "parse", parse_flags)
    code: int = module.main(parse(configs[word], words, prog))
    return code


def _near(word: str, known: dict[str, Command] | dict[str, type]) -> str:
    from diffkit.commands.flags import nearest

    return nearest(word, known)


def _help() -> str:
    lines = [f"  {name:<14}{command.summary}" for name, command in COMMANDS.items()]
    return "\n".join(
        [
            "usage: diffkit COMMAND ...",
            "",
            "A toolbox for latent diffusion models.",
            "",
            *lines,
            "",
            "diffkit COMMAND --help shows a command's flags; --debug anywhere shows tracebacks;",
            "diffkit --version shows the version.",
        ]
    )


def _group_help(prog: str, configs: dict[str, type]) -> str:
    lines = [f"usage: {prog} COMMAND ...", ""]
    for name, config in configs.items():
        summary = (config.__doc__ or "").strip().split("\n")[0]
        lines.append(f"  {name:<12}{summary}")
    return "\n".join(lines)


def _hush_libraries() -> None:
    warnings.simplefilter("ignore", FutureWarning)
    # Read by the libraries when they are first imported, which is after this.
    for name in ("DIFFUSERS_VERBOSITY", "TRANSFORMERS_VERBOSITY"):
        os.environ.setdefault(name, "error")


if __name__ == "__main__":
    sys.exit(main())
