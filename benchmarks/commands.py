"""What costs and studies need until they are started by `benchmarks.__main__`."""

from typing import Any

import tyro


def main(commands: Any, description: str | None) -> None:
  """Runs a command."""
  tyro.cli(commands, description=description)()
