"""Where a run's numbers go: the log, TensorBoard, metrics.jsonl, the terminal.

The writers are clu's, without TensorFlow. `clu.metric_writers` imports it for
one class, its SummaryWriter; importing this module first puts ours, built on
TensorBoard alone, in that place. TensorFlow is left out even where it is
installed: it takes seconds to import and all of the GPU's memory.
"""

import glob
import io
import json
import os
import pathlib
import sys
import time
import types
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from absl import logging
from PIL import Image
from tensorboard.backend.event_processing import event_file_loader
from tensorboard.compat.proto import event_pb2, summary_pb2
from tensorboard.plugins.histogram import summary_v2 as histogram
from tensorboard.plugins.hparams import summary_v2 as hparams_plugin
from tensorboard.plugins.image import metadata as image_metadata
from tensorboard.plugins.scalar import summary_v2 as scalar
from tensorboard.plugins.text import summary_v2 as text_plugin
from tensorboard.summary.writer import event_file_writer, record_writer
from tensorboard.util import tensor_util

from distillfss_jax import files

_CLU_NAME = 'clu.metric_writers.summary_writer'
if 'clu.metric_writers' not in sys.modules:
  sys.modules[_CLU_NAME] = types.ModuleType(_CLU_NAME)
  sys.modules[_CLU_NAME].SummaryWriter = lambda logdir: SummaryWriter(logdir)

from clu import metric_writers  # noqa: E402


def create(
  workdir: str | os.PathLike, *, resume_step: int | None = None
) -> metric_writers.MetricWriter:
  """Returns the writer of a run.

  Process 0 writes to the log, `<workdir>/tensorboard` and
  `<workdir>/metrics.jsonl`; the others write to their logs only.

  Args:
    workdir: the run's folder.
    resume_step: drop what an earlier run wrote of later steps, so that no step
      is reported twice. -1 drops everything (the run starts over), None keeps
      everything.
  """
  if jax.process_index() != 0:
    return metric_writers.create_default_writer(just_logging=True)
  workdir = pathlib.Path(workdir)
  return metric_writers.MultiWriter(
    [
      metric_writers.LoggingWriter(),
      SummaryWriter(workdir / 'tensorboard', resume_step=resume_step),
      JsonlWriter(workdir / 'metrics.jsonl', resume_step=resume_step),
    ]
  )


class SummaryWriter(metric_writers.MetricWriter):
  """A clu MetricWriter to TensorBoard, without TensorFlow.

  Writes the summaries clu's own writer writes, but no audio and no videos:
  those are skipped with a warning.
  """

  def __init__(
    self, logdir: str | os.PathLike, *, resume_step: int | None = None
  ):
    """Opens a new event file; see `create` for resume_step."""
    logdir = os.fspath(logdir)
    old = glob.glob(os.path.join(logdir, 'events.out.tfevents.*'))
    if resume_step is not None:
      for path in old:
        _drop_later_events(path, resume_step)
    self._file = event_file_writer.EventFileWriter(logdir)
    if not old or resume_step is not None:
      # An open TensorBoard has read what is dropped: from the second START on
      # it forgets that step and all later ones.
      start = event_pb2.Event(
        wall_time=time.time(),
        step=0 if resume_step is None else resume_step + 1,
        session_log=event_pb2.SessionLog(status=event_pb2.SessionLog.START),
      )
      self._file.add_event(start)

  def write_summaries(self, step, values, metadata=None):
    """Writes raw tensors with the SummaryMetadata of their plugin."""
    if isinstance(metadata, bytes):
      metadata = summary_pb2.SummaryMetadata.FromString(metadata)
    for tag, value in values.items():
      self._write_tensor(step, tag, np.asarray(value), metadata)

  def write_scalars(self, step, scalars):
    """Writes numbers; arrays of one element count as numbers."""
    for tag, value in scalars.items():
      self._write(step, scalar.scalar_pb(tag, _number(value)))

  def write_images(self, step, images):
    """Writes [H, W, C] or [N, H, W, C] images, uint8 or floats in [0, 1]."""
    for tag, value in images.items():
      pictures = _to_uint8(tag, value)
      height, width = pictures.shape[1:3]
      strings = [str(width).encode(), str(height).encode()]
      tensor = np.array(strings + [_png(x) for x in pictures], object)
      metadata = image_metadata.create_summary_metadata(
        display_name=None, description=None, converted_to_tensor=True
      )
      self._write_tensor(step, tag, tensor, metadata)

  def write_texts(self, step, texts):
    """Writes Markdown texts."""
    for tag, value in texts.items():
      self._write(step, text_plugin.text_pb(tag, value))

  def write_histograms(self, step, arrays, num_buckets=None):
    """Writes distributions, of 30 buckets where none are given."""
    for tag, value in arrays.items():
      buckets = (num_buckets or {}).get(tag)
      self._write(
        step, histogram.histogram_pb(tag, np.asarray(value), buckets=buckets)
      )

  def write_hparams(self, hparams):
    """Writes hyperparameters; nested dicts get '/'-joined names."""
    flat = {}
    for name, value in _flat(hparams):
      simple = isinstance(value, bool | int | float | str)
      flat[name] = value if simple else str(value)
    self._write(0, hparams_plugin.hparams_pb(flat))

  def write_videos(self, step, videos):
    """Skips videos: no plugin of TensorBoard shows them."""
    del step
    logging.log_first_n(
      logging.WARNING, 'TensorBoard gets no videos: %s.', 1, list(videos)
    )

  def write_audios(self, step, audios, *, sample_rate):
    """Skips audio."""
    del step, sample_rate
    logging.log_first_n(
      logging.WARNING, 'TensorBoard gets no audio: %s.', 1, list(audios)
    )

  def flush(self):
    """Brings everything to the file."""
    with files.writing(self._file.get_logdir()):
      self._file.flush()

  def close(self):
    """Flushes and closes the file."""
    self._file.close()

  def _write(self, step, summary):
    event = event_pb2.Event(
      wall_time=time.time(), step=int(step), summary=summary
    )
    with files.writing(self._file.get_logdir()):
      self._file.add_event(event)

  def _write_tensor(self, step, tag, array, metadata):
    summary = summary_pb2.Summary()
    summary.value.add(
      tag=tag, metadata=metadata, tensor=tensor_util.make_tensor_proto(array)
    )
    self._write(step, summary)


class JsonlWriter(metric_writers.MetricWriter):
  """A clu MetricWriter of scalars to lines of JSON.

  One line per `write_scalars`: {"step": 10, "time": 1.7e9, "loss": 0.5}. A
  number that is not finite is null, which JSON readers understand.
  """

  def __init__(
    self, path: str | os.PathLike, *, resume_step: int | None = None
  ):
    """Prepares `path`; see `create` for resume_step.

    Lines that are no JSON, as a killed run leaves them, are dropped.
    """
    self._path, self._kept = pathlib.Path(path), set()
    self._path.parent.mkdir(parents=True, exist_ok=True)
    if self._path.exists():
      text = self._path.read_text(errors='replace')
      lines = text.splitlines(keepends=True)
      kept = ''.join(line for line in lines if _keeps(line, resume_step))
      if kept != text:
        files.write_atomically(self._path, kept)
      # What a resumed run finds out once more about the step it starts from.
      rows = map(json.loads, kept.splitlines()[-8:])
      self._kept = {_name(row) for row in rows if row['step'] == resume_step}

  def write_scalars(self, step, scalars):
    """Appends one line."""
    taken = {'step', 'time'} & set(scalars)
    if taken:
      raise ValueError(f'a metric cannot be named {sorted(taken)}: rename it')
    row = {'step': int(step), 'time': round(time.time(), 3)}
    for name, value in scalars.items():
      value = _number(value)
      row[name] = value if np.isfinite(value) else None
    if _name(row) in self._kept:
      return
    with files.writing(self._path.parent), self._path.open('a') as file:
      file.write(json.dumps(row) + '\n')

  def write_summaries(self, step, values, metadata=None):
    """Leaves tensors to TensorBoard."""

  def write_images(self, step, images):
    """Leaves images to TensorBoard."""

  def write_videos(self, step, videos):
    """Leaves videos out."""

  def write_audios(self, step, audios, *, sample_rate):
    """Leaves audio out."""

  def write_texts(self, step, texts):
    """Leaves texts to TensorBoard."""

  def write_histograms(self, step, arrays, num_buckets=None):
    """Leaves distributions to TensorBoard."""

  def write_hparams(self, hparams):
    """Leaves hyperparameters to TensorBoard."""

  def flush(self):
    """Does nothing: no line waits."""

  def close(self):
    """Does nothing: no file is open."""


class Progress:
  """Speed, time left and a few metrics, as short lines on the terminal.

  clu's ReportProgress must be called after every single step and cannot show
  the loss; our loop runs many steps per call.
  """

  def __init__(
    self,
    total: int,
    *,
    start: int = 0,
    noun: str = 'step',
    every_seconds: float = 5.0,
    clock: Callable[[], float] = time.monotonic,
    show: Callable[[str], None] | None = None,
  ):
    """Starts the clock.

    Args:
      total: the step at which the run is done.
      start: steps done already, in a resumed run.
      noun: what is counted.
      every_seconds: least time between two lines; the first and the last
        update always show one.
      clock: gives the time in seconds.
      show: takes a line; the default prints it on process 0.
    """
    self._total, self._every, self._clock = total, every_seconds, clock
    self._noun = noun
    self._show = show or _print_on_main
    self._begin = self._mark = (clock(), start)
    self._shown = False
    self._speed = 0.0

  def update(self, step: int, extra: Mapping[str, Any] | None = None) -> float:
    """Takes note of `step` steps done; shows a line if it is time to.

    Args:
      step: optimiser steps done so far.
      extra: metrics to show behind, such as {'loss': 0.123}.

    Returns:
      Steps per second since the last line (0.0 before any step is done).
    """
    now = self._clock()
    then, done = self._mark
    if now > then and step > done:
      self._speed = (step - done) / (now - then)
    ends = step >= self._total
    if ends or not self._shown or now - then >= self._every:
      self._show(self._line(step, now, extra or {}))
      self._mark, self._shown = (now, step), True
    return self._speed

  def _line(self, step, now, extra):
    noun = self._noun
    parts = [f'{noun} {step:>{len(str(self._total))}}/{self._total}']
    parts += [f'{_digits(self._speed)} {noun}s/s']
    if step >= self._total:
      parts += [f'done in {_duration(now - self._begin[0])}']
    elif self._speed:
      parts += [f'ETA {_duration((self._total - step) / self._speed)}']
    parts += [f'{name} {_number(x):.4g}' for name, x in extra.items()]
    return '  '.join(parts)


def _print_on_main(line):
  if jax.process_index() == 0:
    print(line, file=sys.stderr, flush=True)


def _duration(seconds):
  """Returns seconds as people say them: 45s, 3m12s, 1h02m, 2d03h."""
  seconds = round(seconds)
  minutes, hours, days = seconds // 60, seconds // 3600, seconds // 86400
  if days:
    return f'{days}d{hours % 24:02}h'
  if hours:
    return f'{hours}h{minutes % 60:02}m'
  if minutes:
    return f'{minutes}m{seconds % 60:02}s'
  return f'{seconds}s'


def _digits(speed):
  """Returns three digits and no exponent, or '-' for no speed yet."""
  if not speed:
    return '-'
  return f'{speed:.0f}' if speed >= 100 else f'{speed:.3g}'


def _number(value):
  return float(np.asarray(value).item())


def _flat(tree, prefix=''):
  """Yields (path, value) of nested mappings, ConfigDicts among them."""
  for name, value in tree.items():
    if hasattr(value, 'items'):
      yield from _flat(value, f'{prefix}{name}/')
    else:
      yield f'{prefix}{name}', value


def _to_uint8(tag, value):
  """Returns images as uint8 [N, H, W, C]."""
  array = np.asarray(value)
  array = array[None] if array.ndim == 3 else array
  if array.ndim != 4 or array.shape[-1] not in (1, 3, 4):
    raise ValueError(
      f'image {tag!r} has shape {np.shape(value)}, expected [H, W, C] or '
      '[N, H, W, C] with C of 1, 3 or 4'
    )
  if array.dtype == np.uint8:
    return array
  if not np.issubdtype(array.dtype, np.floating):
    raise ValueError(
      f'image {tag!r} is {array.dtype}, expected uint8 or floats in [0, 1]'
    )
  return np.rint(np.clip(array, 0, 1) * 255).astype(np.uint8)


def _png(picture):
  buffer = io.BytesIO()
  picture = picture[..., 0] if picture.shape[-1] == 1 else picture
  Image.fromarray(picture).save(buffer, format='PNG')
  return buffer.getvalue()


def _name(row):
  """What a line of metrics.jsonl is about: its step and its metrics."""
  return row['step'], *sorted(row)


def _keeps(line, resume_step):
  """Returns whether a line of metrics.jsonl is whole and not too late."""
  if not line.endswith('\n'):
    return False
  try:
    step = json.loads(line)['step']
  except (ValueError, KeyError, TypeError):
    return False
  return resume_step is None or step <= resume_step


def _drop_later_events(path, resume_step):
  """Rewrites an event file without the summaries of later steps."""
  kept, dropped = io.BytesIO(), False
  records = record_writer.RecordWriter(kept)
  # The loader stops without an error where a killed run broke off.
  for raw in event_file_loader.RawEventFileLoader(path).Load():
    event = event_pb2.Event.FromString(raw)
    if event.HasField('summary') and event.step > resume_step:
      dropped = True
    else:
      records.write(raw)
  if dropped:
    files.write_atomically(path, kept.getvalue())
