"""Measurements of Alrao and of its peers.

    python -m benchmarks list
    python -m benchmarks run SUITE [options]      train one network once
    python -m benchmarks sweep SUITE [options]    train a whole table, or what it lacks
    python -m benchmarks study NAME [options]     a figure of the papers, or a control
    python -m benchmarks cost NAME [options]      what steps, memory and seeds cost
    python -m benchmarks collect NAME [options]   fold ended runs into an archive
    python -m benchmarks report [options]         write the tables from the archives

Behind a name, --help lists its options. Killed, `run --resume`, `sweep` and `study` go
on after the last checkpoint.
"""

import _thread
import importlib
import os
import pkgutil
import signal
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

PROG = "python -m benchmarks"
ROOMS = {"run": "suites", "sweep": "suites", "study": "studies", "cost": "costs"}
REPORTS = {"report": "ReportCommand", "collect": "CollectCommand"}


def main(arguments: Sequence[str] | None = None) -> None:
  """Runs a command.

  It exits with 2 where options, data, records or the disk are not as they should be,
  and says so in a line; with 130 where it was interrupted.

  Args:
    arguments: The command line, by default the process's.
  """
  arguments = sys.argv[1:] if arguments is None else arguments
  if not arguments or arguments[0] in ("-h", "--help"):
    print(__doc__)
    return
  command, *rest = arguments
  if command == "list":
    _list()
    return
  if command in REPORTS:
    _run(_report, command, rest)
    return
  if command not in ROOMS:
    known = ", ".join(["list", *ROOMS, *REPORTS])
    _refuse(f"the command must be one of {known}, got {command}; see --help.")
  known = _names(ROOMS[command])
  if not rest or rest[0] not in known:
    what = f"got {rest[0]}" if rest else "got none"
    _refuse(f"{command} must be followed by one of {', '.join(known)}, {what}.")
  _run(_in_room, command, rest)


def _in_room(command: str, rest: Sequence[str]) -> Any:
  """Imports what a command needs; returns what runs it."""
  name, *options = rest
  room, prog = ROOMS[command], f"{PROG} {command} {name}"
  module = importlib.import_module(f"benchmarks.{room}.{name}")
  if room == "suites":
    from benchmarks.suites import _suite

    start = _suite.run_from if command == "run" else _suite.sweep_from
    return lambda: start(module.SUITE, options, prog)
  import tyro

  found = module.STUDY if room == "studies" else module.COST
  return lambda: tyro.cli(found, args=options, prog=prog)()


def _report(command: str, rest: Sequence[str]) -> Any:
  """Imports the report; returns what runs it."""
  import tyro

  from benchmarks import report

  found = getattr(report, REPORTS[command])
  return lambda: tyro.cli(found, args=rest, prog=f"{PROG} {command}")()


def _run(prepare: Any, command: str, rest: Sequence[str]) -> None:
  """Prepares and runs a command; an interrupt or an error of its user is one line."""
  # Imports take seconds, and C code in them turns an interrupt into errors of its own.
  before = signal.signal(signal.SIGINT, _interrupted_early)
  try:
    import jax

    from benchmarks.data.cache import cache_dir
    from benchmarks.workloads.devices import REFUSALS

    jax.config.update("jax_compilation_cache_dir", str(cache_dir() / "compiled"))
    start = prepare(command, rest)
  except BaseException:
    signal.signal(signal.SIGINT, before)
    raise
  interrupt = _Interrupt()
  try:
    signal.signal(signal.SIGINT, interrupt)
    start()
    if interrupt.pressed:  # swallowed, and the work ended before it was repeated
      raise KeyboardInterrupt
  except REFUSALS as error:
    _refuse(str(error))
  except KeyboardInterrupt:
    interrupt.end()
    kept = (
      "what was measured is kept, and the same command measures anew."
      if command == "cost"
      else "the same command (run: with --resume) goes on after the last checkpoint."
    )
    _say(f"\ninterrupted; {kept}")
    sys.exit(130)
  finally:
    interrupt.end()
    signal.signal(signal.SIGINT, before)


class _Interrupt:
  """A handler of Ctrl-C that asks again until it is heard.

  Python drops an exception that a finaliser, a weak reference's callback or a hook of
  the garbage collector raises, and JAX has all three. An interrupt that comes then
  would be lost.
  """

  again = 2.0  # seconds: more than what stands in a `finally` takes

  def __init__(self):
    self.pressed = False
    self._timer: threading.Timer | None = None

  def __call__(self, *_: object) -> NoReturn:
    self.pressed = True
    self.end()
    self._timer = threading.Timer(self.again, _thread.interrupt_main)
    self._timer.daemon = True
    self._timer.start()
    raise KeyboardInterrupt

  def end(self) -> None:
    if self._timer is not None:
      self._timer.cancel()


def _interrupted_early(*_: object) -> NoReturn:
  _say("\ninterrupted before anything was begun.")
  os._exit(130)


def _list() -> None:
  """Prints all names, each with its module's first line, which needs no import."""
  for room in dict.fromkeys(ROOMS.values()):
    print(f"{' / '.join(command for command in ROOMS if ROOMS[command] == room)}:")
    for name in _names(room):
      text = (_folder(room) / f"{name}.py").read_text(encoding="utf-8")
      first = text.lstrip('"').splitlines()[0].rstrip('"')
      print(f"  {name:12s}  {first}")


def _names(room: str) -> list[str]:
  found = (module.name for module in pkgutil.iter_modules([str(_folder(room))]))
  return sorted(name for name in found if not name.startswith("_"))


def _folder(room: str) -> Path:
  return Path(__file__).parent / room


def _say(text: str) -> None:
  print(text, file=sys.stderr, flush=True)


def _refuse(text: str) -> NoReturn:
  _say(f"error: {text}")
  sys.exit(2)


if __name__ == "__main__":
  main()
