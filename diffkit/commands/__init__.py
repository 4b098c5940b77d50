"""The commands of `diffkit`, one module each, imported only when the command is called.

A command module has

- `configs() -> dict[str, type]`: the config dataclass of every subcommand word (`{"merge":
  MergeConfig, ...}`), or `{"": Config}` when the command has none. Field docstrings are the help.
- `main(config) -> int`: the work; returns 0 when done and 1 when some items failed. It raises
  `diffkit.errors.UserError` for what could not start and `RunFailed` for what broke off.
- optionally `parse(config_class, argv, prog) -> config`, where flags are not the only source of
  values; the default is `diffkit.commands.flags.parse_flags`.

`diffkit.cli` maps names to modules, turns errors into exit codes and takes `--debug`.
"""
