"""The one training loop.

A run's folder holds all there is to know of it: the config, the ids of its
images, the log, checkpoints, TensorBoard events, metrics.jsonl, pictures and
results.json. A run that was killed goes on from its newest good checkpoint and
ends with the same numbers: all that is random is a function of seed and step.
"""

import contextlib
import dataclasses
import importlib.metadata
import json
import os
import pathlib
import platform
import sys
import time

import jax
import numpy as np
from absl import logging

from distillfss_jax import config as configs
from distillfss_jax import files, optim, parallel, params, tasks, train_step
from distillfss_jax.ops.metrics import Confusion
from distillfss_jax.workdir import (
  checkpoint,
  locking,
  pictures,
  results,
  signals,
  writer,
)

PATIENCE = 10.0  # seconds a dispatch may take before the terminal hears of it
PACKAGES = ('jax', 'flax', 'optax', 'orbax-checkpoint', 'grain', 'numpy')


def run(config, workdir: str | os.PathLike) -> dict:
  """Trains what a config says, and scores it; returns the results.

  Args:
    config: see `configs/common.py`.
    workdir: the run's folder. If it holds this run unfinished, the run goes
      on; if finished, its results are returned.

  Raises:
    ValueError: the config does not fit the data, or the folder holds a run of
      another config or is in use.
    OSError: the folder cannot be written.
    signals.Stopped: by SIGTERM or Ctrl-C; what was done is saved.
  """
  with signals.Stop() as stop:
    return _run(config, pathlib.Path(workdir), stop)


def _run(config, workdir, stop):
  begin = time.monotonic()
  results = workdir / 'results.json'
  _check_same(config, workdir)
  if _on_first(results.exists()):
    logging.info('%s is finished: %s holds its scores', workdir, results)
    # Other processes may not see it yet, and nobody asks them.
    first = jax.process_index() == 0
    return json.loads(results.read_text()) if first else {}
  task = tasks.build(config)
  over = parallel.mesh()
  compiled = train_step.build(config, task.ways, over, streaming=task.streaming)
  initial = compiled.draw()
  # What is wrong with files of weights is said before there is a folder; a run
  # that goes on has no need of them.
  fresh = _on_first(not (workdir / 'checkpoints').exists())
  if fresh:
    initial = compiled.load(initial)
  with contextlib.ExitStack() as last:
    lock = last.enter_context(_claimed(config, workdir))
    logging.info('parameters:\n%s', _overview(initial, compiled, config))
    saver = checkpoint.Checkpointer(workdir / 'checkpoints')
    last.callback(saver.close)
    found = saver.restore(jax.eval_shape(compiled.start, initial))
    if not (found or fresh):
      initial = compiled.load(initial)
    out = writer.create(workdir, resume_step=found.step if found else -1)
    last.callback(out.close)
    if not found:
      out.write_hparams(hparams(config))
    task.connect(compiled, over, workdir, out)
    job = _Job(config, workdir, task, over, compiled, saver, out, stop, lock)
    return job.run(initial, found, begin)


def _on_first(value):
  """What process 0 says: file systems tell the others late."""
  return bool(parallel.gather(np.bool_(value))[0])


def hparams(config) -> dict:
  """What may distinguish runs of a sweep, for TensorBoard's table.

  That shows what differs, and takes runs for one in which nothing does.
  """
  found = json.loads(config.to_json_best_effort())
  for key in ('eval', 'log_every', 'checkpoint_every'):
    del found[key]
  del found['data']['workers']
  found['data']['args'].pop('data_dir', None)
  return found


@dataclasses.dataclass
class _Job:
  """A run under way: what its parts share."""

  config: object
  workdir: pathlib.Path
  task: object
  over: jax.sharding.Mesh
  compiled: train_step.Program
  saver: checkpoint.Checkpointer
  out: object
  stop: signals.Stop
  lock: locking.Lock | None  # process 0's

  def run(self, initial, found, begin):
    config, task = self.config, self.task
    if jax.process_index() == 0:
      files.write_atomically(
        self.workdir / 'ids.json', json.dumps(task.ids(), indent=2) + '\n'
      )
      task.show_begin()
    state = self.compiled.start(initial)
    extra = {'references': {}, 'seconds': {}}
    if found:
      state, extra = found.state, found.extra
      logging.info('goes on from step %d', found.step)
    else:
      extra['references'] = task.references(state)
    state = parallel.replicate(state, self.over)
    clock = {'start': time.monotonic() - begin}
    state = self._loop(state, found, extra, clock)
    begin_test = time.monotonic()
    scored = task.test(state, show=task.to_show())
    clock['test'] = time.monotonic() - begin_test
    seconds = {
      name: clock.get(name, 0) + extra['seconds'].get(name, 0)
      for name in ('start', 'adapt', 'test')
    }
    results = {
      'name': config.name,
      'steps': config.steps,
      **scored.scores(task.classes),
      'references': extra['references'],
      'test_images': scored.images,
      'test_images_per_second': scored.images / scored.seconds,
      'seconds': seconds,
      'versions': _versions(),
      'device': jax.devices()[0].device_kind,
    }
    if self.lock:
      self.lock.check()
    self._conclude(results, scored)
    return results

  def _loop(self, state, found, extra, clock):
    """The loop: dispatches of steps, between them whatever is due."""
    config = self.config
    iterator = iter(self.task.steps())
    if found:
      iterator.set_state(found.data_state)
    step = int(state.step)
    if step >= config.steps:
      return state
    self.task.begin(state)
    progress = None
    begin = time.monotonic()
    per_dispatch = min(config.log_every, config.steps)
    pace, logs = None, _unpack(extra.pop('pending', None))

    def save():
      self.out.flush()  # what is saved is also told
      seconds = {
        'start': clock['start'] + extra['seconds'].get('start', 0),
        'adapt': time.monotonic() - begin + extra['seconds'].get('adapt', 0),
      }
      kept = {**extra, 'seconds': seconds, 'pending': _pack(logs)}
      self.saver.save(step, state, iterator, kept)

    def test():
      self._write_scores(step, self.task.test(state))
      extra['tested'] = step

    if step and self._tests_at(step) and extra.get('tested') != step:
      test()  # the run was stopped before it could
    while step < config.steps:
      with self.stop.deferred():
        count = self._count(step, pace, per_dispatch)
        taken = [next(iterator) for _ in range(count)]
        begin_step = time.monotonic()
        inputs = self.task.arguments(taken, per_dispatch)
        state, log = self.compiled.dispatch(state, *inputs, count)
        log = jax.device_get(parallel.local(log))
        elapsed = time.monotonic() - begin_step
        step += count
        logs.append(
          jax.tree.map(lambda x, count=count: x[:count].astype(float), log)
        )
        if progress is None:
          logging.info('the first step, with compilation: %.1f s', elapsed)
          progress = writer.Progress(config.steps, start=step)
          elapsed = None
        speed = progress.update(step, {'loss': logs[-1]['loss'][-1]})
        if step % config.log_every == 0 or step == config.steps:
          self._log(step, logs, speed)
          logs = []
        pace, wanted = self._agree(elapsed and elapsed / count)
        if wanted:
          save()
          self.saver.wait()
          logging.info('stopped at step %d: the same command goes on', step)
          raise signals.Stopped(wanted)
        if (
          step % config.checkpoint_every == 0
          or self._tests_at(step)
          or step == config.steps
        ):
          save()
        if self._tests_at(step):
          self._stop_if_asked(pace)  # there may not be the time for a test
      if self._tests_at(step):
        test()
    with self.stop.deferred():
      self.saver.wait()
      self._stop_if_asked(pace)
    clock['adapt'] = time.monotonic() - begin
    return state

  def _stop_if_asked(self, pace):
    """Stops where all is saved, if a signal has come to any process."""
    _, wanted = self._agree(pace)
    if wanted:
      self.saver.wait()
      raise signals.Stopped(wanted)

  def _tests_at(self, step):
    every = self.config.eval.every
    return every and step % every == 0 and step < self.config.steps

  def _count(self, step, pace, most):
    """How many steps the next dispatch takes."""
    config = self.config
    # The first dispatch is one step: it compiles, and the second measures.
    count = 1 if pace is None else max(1, int(PATIENCE / pace))
    for every in (config.log_every, config.checkpoint_every, config.eval.every):
      if every:
        count = min(count, every - step % every)
    return min(count, most, config.steps - step)

  def _agree(self, pace):
    """Seconds per step, and the signal to stop by, the same everywhere."""
    if self.lock:
      self.lock.check()
    said = parallel.gather(np.array([pace or 0.0, self.stop.wanted]))
    return said[0, 0] or None, int(said[:, 1].max())

  def _log(self, step, logs, speed):
    logs = jax.tree.map(lambda *x: np.concatenate(x), *logs)
    scalars = {'train/loss': logs['loss'].mean()}
    for name, values in logs['parts'].items():
      scalars[f'train/loss_{name}'] = values.mean()
    for role, counts in logs['confusion'].items():
      confusion = Confusion(counts.astype(np.int64).sum(0))
      scalars[f'support_miou/{role}'] = confusion.miou
    scalars['train/grad_norm'] = logs['grad_norm'].mean()
    rate = optim.schedule(self.config.optim, self.config.steps)
    scalars['train/learning_rate'] = rate(step - 1)
    scalars['steps_per_second'] = speed
    self.out.write_scalars(step, {k: float(v) for k, v in scalars.items()})

  def _write_scores(self, step, scored):
    for size, roles in scored.scores(self.task.classes).items():
      for role, scores in roles.items():
        self.out.write_scalars(
          step,
          {
            f'{size}/{role}_{name}': scores[name]
            for name in ('miou', 'fb_iou', 'f1', 'precision', 'recall')
          },
        )

  def _conclude(self, results, scored):
    """Writes pictures, curves and, last, the results: the run is finished."""
    self._write_scores(self.config.steps, scored)
    if jax.process_index():
      return
    self.task.show_end(scored)
    self.out.flush()
    pictures.curves(
      self.workdir / 'metrics.jsonl', self.workdir / 'panels' / 'curves.png'
    )
    results.write_results(self.workdir, results)
    logging.info(
      'scores on %d test images:\n%s', scored.images, score_table(results)
    )


def _pack(logs):
  """Numbers of steps that are not in the log yet, for a checkpoint."""
  if not logs:
    return None
  return jax.tree.map(lambda *x: np.concatenate(x).tolist(), *logs)


def _unpack(pending):
  if not pending:
    return []
  is_list = lambda x: isinstance(x, list)  # noqa: E731
  return [jax.tree.map(np.asarray, pending, is_leaf=is_list)]


def score_table(results: dict) -> str:
  """The scores of a finished run, for the terminal."""
  rows = []
  for size in ('test', 'test_native'):
    for role, scores in results.get(size, {}).items():
      rows.append((role, 'model' if size == 'test' else 'native', scores))
  references = results['references']
  for role, scores in references.get('untrained', {}).items():
    rows.append((f'untrained {role}', 'model', scores))
  if 'brightness' in references:
    rows.append(('brightness threshold', 'model', references['brightness']))
  names = ('miou', 'fb_iou', 'f1', 'precision', 'recall')
  return results.table(
    [
      (who, size, *(scores[name] for name in names))
      for who, size, scores in rows
    ],
    ('', 'size', 'mIoU', 'FB-IoU', 'F1', 'precision', 'recall'),
  )


def _text(config):
  return json.dumps(json.loads(config.to_json_best_effort()), indent=2) + '\n'


def _check_same(config, workdir):
  """Refuses a folder that holds a run of another config."""
  path = workdir / 'config.json'
  if not path.exists():
    return
  differences = configs.differences(configs.saved(path), config)
  if differences:
    raise ValueError(
      f'{workdir} holds a run of another config; give another --workdir, or '
      'the same config. It differs in: ' + '; '.join(differences)
    )


@contextlib.contextmanager
def _claimed(config, workdir):
  """Makes the run's folder this run's, with its config and its log.

  Yields the lock in process 0, None in others.
  """
  with contextlib.ExitStack() as last:
    lock, problem = None, None
    try:
      if jax.process_index() == 0:
        lock = last.enter_context(_locked(workdir))
        files.write_atomically(workdir / 'config.json', _text(config))
    except (ValueError, OSError) as error:
      problem = error
    in_use = isinstance(problem, locking.InUseError)
    fails, in_use = parallel.gather([problem is not None, in_use])[0]
    if fails:  # all end alike
      kind = locking.InUseError if in_use else ValueError
      raise problem or kind('process 0 cannot start: its last line says why')
    _begin_log(workdir)
    last.callback(_end_log)
    try:
      yield lock
    except Exception:
      logging.info('where it failed', exc_info=True)
      raise


def _locked(workdir):
  with files.writing(workdir):
    workdir.mkdir(parents=True, exist_ok=True)
    return locking.Lock(workdir)


def _begin_log(workdir):
  with files.writing(workdir):
    workdir.mkdir(parents=True, exist_ok=True)  # so that NFS looks again
    handler = logging.get_absl_handler()
    _end_log()
    handler.use_absl_log_file('log', str(workdir))
    handler.addFilter(_not_of_orbax)
    logging.set_verbosity(logging.INFO)


def _not_of_orbax(record):
  """What orbax tells of its insides would be nine tenths of the log."""
  return 'orbax' not in record.pathname or record.levelno > 20


def _end_log():
  """Closes the log of a run in this process, which absl would leave open."""
  handler = logging.get_absl_handler()
  handler.removeFilter(_not_of_orbax)
  written = handler.python_handler.stream
  if getattr(written, 'name', '').startswith('<'):  # <stderr>
    return
  handler.python_handler.stream = sys.stderr
  written.close()


def _overview(variables, compiled, config):
  state = jax.eval_shape(compiled.start, variables)
  rows = []
  for kind, tree in (('trained', state.params), ('frozen', state.frozen)):
    parts = {}
    for path, x in tree.items():
      name = '/'.join(path.split('/')[:2])
      parts[name] = parts.get(name, 0) + int(np.prod(x.shape))
    rows += [(name, kind, f'{n:,}') for name, n in sorted(parts.items())]
  total = params.count(state.params) + params.count(state.frozen)
  rows.append(('all', config.system, f'{total:,}'))
  return results.table(rows, ('part', 'is', 'parameters'))


def _versions():
  versions = {name: importlib.metadata.version(name) for name in PACKAGES}
  return {'python': platform.python_version(), **versions}
