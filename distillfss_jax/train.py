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
import shlex
import shutil
import sys
import time

import jax
import numpy as np
from absl import logging

from distillfss_jax import config as configs
from distillfss_jax import (
  feeding,
  files,
  held_out,
  parallel,
  params,
  tasks,
  train_step,
  unlabelled,
)
from distillfss_jax.evaluators.base import COLUMNS
from distillfss_jax.ops.metrics import Confusion
from distillfss_jax.tasks.base import Place, Task
from distillfss_jax.workdir import (
  checkpoint,
  locking,
  pictures,
  report,
  signals,
  writer,
)
from distillfss_jax.workdir import results as results_lib

PATIENCE = 10.0  # seconds a dispatch may take before the terminal hears of it
# Names in checkpoints of older versions, and today's.
RENAMED = {'rest/': 'buffers/'}
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
  configs.check_values(config)
  _check_same(config, workdir)
  finished = _on_first(results.exists())
  try:
    data, task = tasks.load(config)
    _check_data(data, workdir)
  except (ValueError, OSError) as error:
    if not finished or isinstance(error, _OtherDataError):
      raise
    # Its scores stand, whether or not its data are still there.
  if finished:
    logging.info('%s is finished: %s holds its scores', workdir, results)
    # Other processes may not see it yet, and nobody asks them.
    first = jax.process_index() == 0
    return files.read_json(results) if first else {}
  config = held_out.decide(config, data, workdir)
  steps = total_steps(config, data.per_epoch)
  data.shares = unlabelled.answer(config, data, steps, workdir)
  mesh = parallel.mesh()
  program = train_step.build(
    config, data.ways, mesh, steps=steps, per_epoch=data.per_epoch
  )
  if program.takes is not task.gives:
    raise ValueError(
      f'config.system={config.system!r} learns from a {program.takes.__name__},'
      f' and config.task={config.task!r} gives a {task.gives.__name__}: they '
      'do not belong together'
    )
  initial = program.draw()
  # What is wrong with files of weights is said before there is a folder; a run
  # that goes on has no need of them.
  fresh = _on_first(not (workdir / 'checkpoints').exists())
  if fresh:
    initial = program.load(initial)
  with contextlib.ExitStack() as last:
    lock = last.enter_context(_claimed(config, workdir))
    logging.info('parameters:\n%s', _overview(initial, program, config))
    saver = checkpoint.Checkpointer(workdir / 'checkpoints')
    last.callback(saver.close)
    found = saver.restore(
      jax.eval_shape(program.start, initial), renamed=RENAMED
    )
    if not (found or fresh):
      initial = program.load(initial)
    out = writer.create(workdir, resume_step=found.step if found else -1)
    last.callback(out.close)
    if not found:
      out.write_hparams(hparams(config))
    place = Place(program, mesh, workdir, out)
    job = _Job(
      config, steps, task(config, data, place, steps), place, saver, stop, lock
    )
    return job.run(initial, found, begin)


def total_steps(config, per_epoch: float) -> int:
  """Steps of a whole run: `config.epochs`, if it is set, or `config.steps`."""
  if config.epochs:
    return max(1, round(config.epochs * per_epoch))
  return config.steps


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
  steps: int
  task: Task
  place: Place
  saver: checkpoint.Checkpointer
  stop: signals.Stop
  lock: locking.Lock | None  # process 0's

  @property
  def every(self):
    """Steps between tests on the way; 0 for none."""
    options = self.config.eval
    if options.epochs:
      return max(1, round(options.epochs * self.task.data.per_epoch))
    return options.every

  @property
  def out(self):
    return self.place.out

  @property
  def workdir(self):
    return self.place.workdir

  def run(self, initial, found, begin):
    config, task = self.config, self.task
    if jax.process_index() == 0:
      files.write_atomically(
        self.workdir / 'ids.json', json.dumps(task.data.ids(), indent=2) + '\n'
      )
      task.show_begin()
    state = self.place.program.start(initial)
    extra = {'references': {}, 'seconds': {}}
    if found:
      state, extra = found.state, found.extra
      logging.info('goes on from step %d', found.step)
    else:
      extra['references'] = task.references(state)
    state = parallel.replicate(state, self.place.mesh)
    clock = {'start': time.monotonic() - begin}
    state = self._loop(state, found, extra, clock)
    reached = int(state.step)
    state = self._chosen(state, extra)
    begin_test = time.monotonic()
    scored = task.test(state, show=task.to_show())
    clock['test'] = time.monotonic() - begin_test
    seconds = {
      name: clock.get(name, 0) + extra['seconds'].get(name, 0)
      for name in ('start', 'adapt', 'test')
    }
    results = {
      'name': config.name,
      'steps': reached,
      **scored.scores,
      'evaluations': {
        x.name: {'size': x.size, 'says': x.says, 'columns': dict(x.columns)}
        for x in scored.protocols
      },
      'notes': [*scored.notes, *_chosen_on_tests(extra, scored)],
      'references': extra['references'],
      'test_images': scored.images,
      'test_images_per_second': scored.images / scored.seconds,
      'seconds': seconds,
      'versions': _versions(),
      'device': jax.devices()[0].device_kind,
    }
    if 'best' in extra:
      results['checkpoint'] = extra['best']
    if self.lock:
      self.lock.check()
    self._conclude(results, scored)
    return results

  def _loop(self, state, found, extra, clock):
    """The loop: dispatches of steps, between them whatever is due."""
    config, task = self.config, self.task
    if not self.steps:  # it is tested as it is
      return state
    iterator = iter(task.batches())
    if found:
      iterator.set_state(found.data_state)
    step = int(state.step)
    if step >= self.steps or extra.get('stopped_early'):
      if self._tests_at(step) and extra.get('tested') != step:
        self._validate(step, state, extra)  # it was stopped before it could
      return state
    shared = task.shared(state)
    feed = feeding.Feed(
      iterator,
      task.as_batch,
      rows=self.place.program.rows,
      mesh=self.place.mesh,
      own=task.own,
      most=min(config.log_every, self.steps),
    )
    with contextlib.closing(feed):
      return self._steps(state, shared, step, feed, extra, clock)

  def _steps(self, state, shared, step, feed, extra, clock):
    config = self.config
    progress = None
    begin = last_told = time.monotonic()
    waited = 0.0  # seconds for data since then
    pace, logs = None, _unpack(extra.pop('pending', None))

    def save():
      self.out.flush()  # what is saved is also told
      seconds = {
        'start': clock['start'] + extra['seconds'].get('start', 0),
        'adapt': time.monotonic() - begin + extra['seconds'].get('adapt', 0),
      }
      kept = {**extra, 'seconds': seconds, 'pending': _pack(logs)}
      self.saver.save(step, state, feed, kept)

    if step and self._tests_at(step) and extra.get('tested') != step:
      self._validate(step, state, extra)  # it was stopped before it could
    while step < self.steps and not extra.get('stopped_early'):
      with self.stop.deferred():
        count = self._count(step, pace, feed.per_dispatch)
        begin_wait = time.monotonic()
        batches, places = feed.take(count)
        begin_step = time.monotonic()
        waited += begin_step - begin_wait
        state, log = self.place.program.dispatch(
          state, shared, batches, places, count, np.uint32(config.seed)
        )
        log = jax.device_get(parallel.local(log))
        elapsed = time.monotonic() - begin_step
        log = jax.tree.map(lambda x, count=count: x[:count].astype(float), log)
        self._check_finite(step, log)
        step += count
        logs.append(log)
        if progress is None:
          logging.info('the first step, with compilation: %.1f s', elapsed)
          progress = writer.Progress(self.steps, start=step)
          elapsed, last_told, waited = None, time.monotonic(), 0.0
        speed = progress.update(step, {'loss': logs[-1]['loss'][-1]})
        if step % config.log_every == 0 or step == self.steps:
          now = time.monotonic()
          self._log(step, logs, speed, waited / max(now - last_told, 1e-9))
          logs, last_told, waited = [], now, 0.0
        pace, wanted = self._agree(elapsed and elapsed / count)
        if wanted:
          save()
          self.saver.wait()
          logging.info('stopped at step %d: the same command goes on', step)
          raise signals.Stopped(wanted)
        if (
          step % config.checkpoint_every == 0
          or self._tests_at(step)
          or step == self.steps
        ):
          save()
        if self._tests_at(step):
          self._stop_if_asked(pace)  # there may not be the time for a test
      if self._tests_at(step):
        self._validate(step, state, extra)
    with self.stop.deferred():
      self.saver.wait()
      self._stop_if_asked(pace)
    clock['adapt'] = time.monotonic() - begin
    return state

  def _check_finite(self, step, log):
    """Raises ValueError at a loss, or a gradient, that is no number.

    Nothing is saved of it.
    """
    for name, what in (('loss', 'loss'), ('grad_norm', 'norm of the gradient')):
      wrong = np.flatnonzero(~np.isfinite(log[name]))
      if not wrong.size:
        continue
      raise ValueError(
        f'the {what} is {log[name][wrong[0]]} at step {step + wrong[0] + 1}: '
        'the run stops, its newest checkpoint before that stays. Try a '
        f'smaller config.optim.lr (it is {self.config.optim.lr:g}), '
        'config.optim.clip_norm=1, config.optim.warmup, or pretrained weights '
        '(config.model.backbone.init); give another --workdir'
      )

  def _validate(self, step, state, extra):
    """Scores the system on the way; keeps the best state if that is asked."""
    scored = self.task.validate(state)
    self._write_scores(step, scored)
    extra['tested'] = step
    if not self.config.eval.keep_best:
      return
    protocol, role, numbers = scored.rows()[0]
    column = next(iter(protocol.columns))
    score, best = numbers[column], extra.get('best')
    if score is not None and (best is None or score > best['score']):
      extra['best'] = {
        'step': step,
        'chosen_on': protocol.name,
        'by': f'{role} {column}',
        'score': float(score),
      }
      # A run that fell back to an older checkpoint may have left a later one.
      if jax.process_index() == 0:
        shutil.rmtree(self.workdir / 'best', ignore_errors=True)
      parallel.gather(0)  # all see it gone
      with contextlib.closing(self._best()) as saver:
        saver.save(step, state)
        saver.wait()
    patience = self.config.eval.patience
    best = extra.get('best')
    if patience and best:
      since = (step - best['step']) // self.every
      extra['stopped_early'] = since >= patience

  def _best(self):
    return checkpoint.Checkpointer(self.workdir / 'best', keep=1)

  def _chosen(self, state, extra):
    """The state to conclude with: the best if that was kept, else the last."""
    if 'best' not in extra:
      return state
    with contextlib.closing(self._best()) as saver:
      found = saver.restore(jax.tree.map(_abstract, state))
    if found is None or found.step != extra['best']['step']:
      raise ValueError(
        f'{self.workdir / "best"} does not hold the checkpoint of step '
        f'{extra["best"]["step"]} that was chosen: give another --workdir'
      )
    return parallel.replicate(found.state, self.place.mesh)

  def _stop_if_asked(self, pace):
    """Stops where all is saved, if a signal has come to any process."""
    _, wanted = self._agree(pace)
    if wanted:
      self.saver.wait()
      raise signals.Stopped(wanted)

  def _tests_at(self, step):
    if step == self.steps:  # the test concludes; a choice has to know it, too
      return bool(self.every) and self.config.eval.keep_best
    return bool(self.every) and step % self.every == 0

  def _count(self, step, pace, most):
    """How many steps the next dispatch takes."""
    config = self.config
    # The first dispatch is one step: it compiles, and the second measures.
    count = 1 if pace is None else max(1, int(PATIENCE / pace))
    for every in (config.log_every, config.checkpoint_every, self.every):
      if every:
        count = min(count, every - step % every)
    return min(count, most, self.steps - step)

  def _agree(self, pace):
    """Seconds per step, and the signal to stop by, the same everywhere."""
    if self.lock:
      self.lock.check()
    said = parallel.gather(np.array([pace or 0.0, self.stop.wanted]))
    return said[0, 0] or None, int(said[:, 1].max())

  def _log(self, step, logs, speed, waiting):
    """Writes means of steps, their pace, and the share of waiting for data."""
    logs = jax.tree.map(lambda *x: np.concatenate(x), *logs)
    scalars = {'train/loss': logs['loss'].mean()}
    for name, values in logs['parts'].items():
      scalars[f'train/loss_{name}'] = values.mean()
    for name, counts in logs['counts'].items():
      scalars[name] = Confusion(counts.astype(np.int64).sum(0)).miou
    scalars['train/grad_norm'] = logs['grad_norm'].mean()
    scalars['train/learning_rate'] = self.place.program.rate(step - 1)
    scalars['steps_per_second'], scalars['data_wait'] = speed, waiting
    self._write_scalars(step, scalars)

  def _write_scores(self, step, scored):
    for protocol, role, numbers in scored.rows():
      self._write_scalars(
        step,
        {
          f'{protocol.name}/{role}_{name}': numbers.get(name)
          for name in protocol.columns
        },
      )

  def _write_scalars(self, step, scalars):
    known = {k: float(v) for k, v in scalars.items() if v is not None}
    self.out.write_scalars(step, known)

  def _conclude(self, results, scored):
    """Writes pictures, curves and, last, the results: the run is finished."""
    self._write_scores(results['steps'], scored)
    if jax.process_index():
      return
    self.task.show_end(scored)
    self.out.flush()
    pictures.curves(
      self.workdir / 'metrics.jsonl', self.workdir / 'panels' / 'curves.png'
    )
    each = {
      role: [None if np.isnan(x) else float(x) for x in values]
      for role, values in scored.each.items()
    }
    ids = self.task.data.ids()['test'] if each else []
    if each:
      results_lib.write_images(self.workdir, ids, each)
    report.write(
      self.workdir,
      results,
      self.task.answers,
      each=(ids, each),
      command=_command(),
    )
    results_lib.write_results(self.workdir, results)
    logging.info(
      'scores on %d test images:\n%s', scored.images, score_table(results)
    )


def _chosen_on_tests(extra, scored):
  """What a reader has to know of scores that chose their own checkpoint."""
  best = extra.get('best')
  if best and best['chosen_on'] in {x.name for x in scored.protocols}:
    yield (
      f'the checkpoint, of step {best["step"]}, was chosen by {best["by"]} on '
      f'the test images ({best["chosen_on"]}): these scores are better than '
      'they would be on new ones'
    )


def _command():
  """The command that started this process, '' where it was no command of ours.

  Not what results.json could hold: the same run may be started in many ways.
  """
  if pathlib.Path(sys.argv[0]).name != 'main.py':
    return ''
  return shlex.join(['python', '-m', 'distillfss_jax.main', *sys.argv[1:]])


def _abstract(x):
  return jax.ShapeDtypeStruct(x.shape, x.dtype)


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
  evaluations = results.get('evaluations') or _EVALUATIONS
  references, first = results['references'], next(iter(evaluations))
  rows = [
    (role, name, numbers)
    for name in evaluations
    for role, numbers in results.get(name, {}).items()
  ]
  rows += [
    (f'untrained {role}', first, numbers)
    for role, numbers in references.get('untrained', {}).items()
  ]
  for name, said in (
    ('brightness', 'brightness threshold'),
    ('otsu', "Otsu's rule"),
    ('prior', 'prior mask, nothing learnt'),
  ):
    if name in references:
      rows.append((said, first, references[name]))
  tables = [
    results_lib.table(
      [
        (who, where, *map(numbers.get, columns))
        for who, where, numbers in rows
        if where in names
      ],
      ('', 'scored', *columns.values()),
    )
    for columns, names in _alike(evaluations)
  ]
  said = [
    f'{name}: {x["says"]}' for name, x in evaluations.items() if x['says']
  ]
  return '\n'.join(['\n\n'.join(tables), *said, *results.get('notes', ())])


def _alike(evaluations):
  """(columns, names) of evaluations that share some column: tables."""
  found = []
  for name, x in evaluations.items():
    for columns, names in found:
      if columns.keys() & x['columns'].keys():
        columns |= x['columns']
        names.append(name)
        break
    else:
      found.append((dict(x['columns']), [name]))
  return found


# Of results that an older version wrote.
_EVALUATIONS = {
  'test': {'columns': COLUMNS, 'says': ''},
  'test_native': {'columns': COLUMNS, 'says': ''},
}


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


class _OtherDataError(ValueError):
  """A run's data are not what they were."""


def _check_data(data, workdir):
  """Refuses a folder whose run has read other data."""
  path = workdir / 'ids.json'
  if not path.exists():
    return
  old, new = files.read_json(path), json.loads(json.dumps(data.ids()))
  # What an older version did not write down cannot be compared.
  differ = [key for key in old if old[key] != new.get(key)]
  if differ:
    raise _OtherDataError(
      f'{workdir} holds a run on other data: {", ".join(differ)} of '
      f'{path.name} differ from what is prepared now, and images it trained on '
      'may be tested. Prepare the data as they were, or give another --workdir'
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
        _check_same(config, workdir)  # another may have begun meanwhile
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


def _overview(variables, program, config):
  state = jax.eval_shape(program.start, variables)
  rows = []
  for kind, tree in (('trained', state.params), ('frozen', state.frozen)):
    parts = {}
    for path, x in tree.items():
      name = '/'.join(path.split('/')[:2])
      parts[name] = parts.get(name, 0) + int(np.prod(x.shape))
    rows += [(name, kind, f'{n:,}') for name, n in sorted(parts.items())]
  total = params.count(state.params) + params.count(state.frozen)
  rows.append(('all', config.system, f'{total:,}'))
  return results_lib.table(rows, ('part', 'is', 'parameters'))


def _versions():
  versions = {name: importlib.metadata.version(name) for name in PACKAGES}
  return {'python': platform.python_version(), **versions}
