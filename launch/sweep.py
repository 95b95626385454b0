"""Runs a grid of experiments, on this machine or on a SLURM cluster.

    python -m launch.sweep configs/nucleus.py
    python -m launch.sweep configs/nucleus.py --grid shots=5,10 seed=0:5
    python -m launch.sweep configs/nucleus.py --via slurm --profile my.toml
    python -m launch.sweep configs/nucleus.py --via print

Keys of --grid without a dot are arguments of the config, keys that start with
'config.' change its values. The run of a cell of the grid lies in
<root>/<config>/<name of the cell>, its output beside that in <name>.log. The
same command goes on where it was: finished runs are skipped, runs that were
stopped go on, failed ones are named and wait for --retry. Ctrl-C, or closing
the terminal, stops it in order; nohup lets it go on without one.
"""

import argparse
import shlex
import signal
import sys
from collections.abc import Sequence

from launch import local, slurm
from launch.plan import Run, plan


class Parser(argparse.ArgumentParser):
  """Arguments whose errors are one line."""

  def error(self, message):
    """Ends the program."""
    sys.exit(f'error: {message}; see --help')


def positive(text: str) -> int:
  """Reads a number from 1, as argparse wants it read."""
  if not text.isdecimal() or int(text) < 1:
    raise argparse.ArgumentTypeError(f'needs a number from 1, got {text!r}')
  return int(text)


def parser() -> argparse.ArgumentParser:
  """The flags."""
  flag = Parser(
    prog='python -m launch.sweep',
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
    allow_abbrev=False,
  )
  several = {'nargs': '+', 'action': 'extend', 'default': []}
  add = flag.add_argument
  add('config', help='a file of configs, without arguments')
  add('--via', choices=('local', 'slurm', 'print'), default='local',
      help='where; print shows the commands and does nothing')  # fmt: skip
  add('--grid', metavar='KEY=VALUES', **several,
      help='such as shots=5,10 seed=0:5; else its sweep()')  # fmt: skip
  add('--set', metavar='KEY[=VALUE]', **several,
      help='the same for every run, such as smoke config.steps=4')  # fmt: skip
  add('--jobs', type=positive,
      help='runs at a time; by default one per GPU, or one')  # fmt: skip
  add('--root', default='runs', help='where the folder of the sweep is')
  add('--retry', action='store_true', help='also what failed before')
  group = flag.add_argument_group('SLURM')
  group.add_argument('--profile', help='a TOML file with setup and these:')
  for name, theirs in slurm.SETTINGS.items():
    group.add_argument(f'--{name}', help=f"sbatch's {theirs}")
  return flag


def sweep(args: argparse.Namespace) -> int:
  """Runs, submits or shows a sweep; returns the exit code."""
  given = {name: getattr(args, name) for name in slurm.SETTINGS}
  on_slurm = args.via == 'slurm' or bool(args.profile or any(given.values()))
  if args.via == 'local' and on_slurm:
    raise ValueError('--profile and the flags of SLURM need --via slurm')
  chosen = slurm.settings(args.profile, given)
  runs = plan(args.config, args.grid, args.set, args.root)
  left = [run for run in runs if not run.finished]
  todo = [run for run in left if args.retry or not run.mark.exists()]
  # What --via print says on stdout can be pasted into a shell.
  said = sys.stderr if args.via == 'print' else sys.stdout
  if len(left) < len(runs):
    print(f'{len(runs) - len(left)} of {len(runs)} are finished', file=said)
  for run in left:
    if run not in todo:
      print(f'{run.name} failed before; --retry tries it again', file=said)
  if not todo:
    return int(bool(left))
  if args.via == 'print':
    show(todo, chosen, args.jobs, on_slurm)
  elif args.via == 'slurm':
    slurm.submit(runs, todo, chosen, args.jobs)
  else:
    devices = local.gpus()
    jobs = min(args.jobs or len(devices) or 1, len(todo))
    places = local.shares(jobs, devices)
    return local.Sweep(runs, todo, places, args.retry).run()
  return 0


def show(todo: Sequence[Run], chosen: dict, jobs, on_slurm: bool) -> None:
  """Prints what would be run or submitted, to be pasted into a shell."""
  if not on_slurm:
    text = '\n'.join(shlex.join(run.command) for run in todo)
  else:
    command, script = slurm.batch(todo, chosen, jobs)
    text = (
      f'mkdir -p {shlex.quote(str(todo[0].folder.parent))}\n'
      f"{shlex.join(command)} <<'END_OF_SCRIPT'\n{script}END_OF_SCRIPT"
    )
  signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `| head` is no error
  print(text)


def main(argv: Sequence[str]) -> None:
  """Ends with the sweep's exit code, or with one line that says why not."""
  try:
    sys.exit(sweep(parser().parse_args(argv)))
  except (ValueError, OSError) as error:
    sys.exit(f'error: {error}')
  except KeyboardInterrupt:  # before anything ran
    sys.exit(130)


if __name__ == '__main__':
  main(sys.argv[1:])
