"""The `--help` of scripts that take dataclasses of arguments."""

from argparse import Action, ArgumentDefaultsHelpFormatter, RawDescriptionHelpFormatter


class HelpFormatter(RawDescriptionHelpFormatter, ArgumentDefaultsHelpFormatter):
    """The description as it stands, commands included; defaults where there is one to tell."""

    def _get_help_string(self, action: Action) -> str | None:
        return action.help if action.default in (None, []) else super()._get_help_string(action)
