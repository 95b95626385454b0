"""Checkpoints: exact, verified, and never the end of a run."""

import errno
import json
import os
import pathlib
import resource
import shutil
import subprocess
import sys
import textwrap

import flax
import grain
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx

from distillfss_jax import types
from distillfss_jax.workdir import checkpoint


def assert_same(a, b):
  assert jax.tree.structure(a) == jax.tree.structure(b)
  a, b = checkpoint._paths(a), checkpoint._paths(b)
  for path, x in a.items():
    assert isinstance(x, np.ndarray) is isinstance(b[path], np.ndarray), path
    assert x.dtype == b[path].dtype, path
    assert x.shape == b[path].shape, path
    assert np.asarray(x).tobytes() == np.asarray(b[path]).tobytes(), path


def small(seed=0):
  rng = np.random.default_rng(seed)
  return {
    'w': jnp.asarray(rng.normal(size=(40, 30)), jnp.float32),
    'layers': [{'b': jnp.asarray(rng.normal(size=7), jnp.bfloat16)}],
    'key': jnp.asarray(rng.integers(0, 2**32, 2), jnp.uint32),
    'step': jnp.int32(seed),
  }


def save_and_wait(saver, step, state):
  saver.save(step, state)
  saver.wait()


def train_state(seed=0):
  class Net(nnx.Module):
    def __init__(self, rngs):
      self.linear = nnx.Linear(4, 3, rngs=rngs)
      self.norm = nnx.BatchNorm(3, rngs=rngs)

  _, params, rest = nnx.split(Net(nnx.Rngs(seed)), nnx.Param, ...)
  params, rest = nnx.to_pure_dict(params), nnx.to_pure_dict(rest)
  return types.TrainState(
    step=jnp.int32(7),
    params=params,
    frozen={'backbone/kernel': jnp.arange(6.0)},
    buffers=rest,
    opt_state=optax.adamw(1e-3).init(params),
  )


def test_everything_comes_back_bit_for_bit(tmp_path):
  state = {
    'train': train_state(),
    'odd': [np.float64(1 / 3) * np.ones(2), np.zeros((0, 3), np.float32)],
    'nan': np.asarray([np.nan, -0.0, np.inf]),
    'flags': [np.asarray([True, False]), np.asarray(True)],
  }
  saver = checkpoint.Checkpointer(tmp_path)
  saver.save(7, state, {'next_index': 20}, {'best': 0.1, 'name': 'a'})
  saver.close()
  blank = {
    **jax.tree.map(np.zeros_like, {**state, 'train': None}),
    'train': train_state(seed=1),
  }
  saver = checkpoint.Checkpointer(tmp_path)
  step, restored, data_state, extra = saver.restore(blank)
  saver.close()
  assert step == 7
  assert data_state == {'next_index': 20}
  assert extra == {'best': 0.1, 'name': 'a'}
  assert_same(restored, state)


def test_abstract_arrays_and_shardings(tmp_path):
  mesh = jax.make_mesh(
    (1,), ('data',), axis_types=(jax.sharding.AxisType.Auto,)
  )
  spread = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
  state = small()
  saver = checkpoint.Checkpointer(tmp_path)
  saver.save(1, state)
  abstract = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=spread), state
  )
  restored = saver.restore(abstract).state
  assert_same(restored, state)
  assert all(x.sharding == spread for x in jax.tree.leaves(restored))
  # What was uncommitted stays so: it may join any mesh.
  assert not any(x.committed for x in jax.tree.leaves(saver.restore(state)[1]))
  saver.close()


def test_orbax_alone_can_read_it(tmp_path):
  state = small()
  saver = checkpoint.Checkpointer(tmp_path)
  saver.save(1, state)
  saver.close()
  with ocp.CheckpointManager(tmp_path) as manager:
    wanted = {k: np.asarray(x) for k, x in checkpoint._paths(state).items()}
    read = manager.restore(
      1, args=ocp.args.Composite(state=ocp.args.StandardRestore(wanted))
    ).state
  assert_same(read, wanted)


def test_state_may_change_as_soon_as_save_returns(tmp_path):
  state = {'w': jnp.arange(300_000.0), 'n': np.arange(300_000.0)}
  expected = jax.tree.map(np.array, state)
  saver = checkpoint.Checkpointer(tmp_path)
  saver.save(1, state)
  jax.jit(lambda w: w * 0 - 1, donate_argnums=0)(state['w'])
  state['n'][:] = -1
  blank = {'w': jnp.zeros(300_000), 'n': np.zeros(300_000)}
  restored = saver.restore(blank).state
  saver.close()
  jax.tree.map(np.testing.assert_array_equal, restored, expected)


def test_data_iterators(tmp_path):
  def batches():
    data = grain.MapDataset.range(100).seed(0).shuffle().repeat(None)
    return iter(data.batch(4).to_iter_dataset())

  iterator = batches()
  for _ in range(3):
    next(iterator)
  saver = checkpoint.Checkpointer(tmp_path)
  saver.save(3, small(), iterator)
  expected = next(iterator).tolist()
  resumed = batches()
  resumed.set_state(saver.restore(small()).data_state)
  assert next(resumed).tolist() == expected
  saver.save(4, small(), b'\x00\xff raw')
  assert saver.restore(small()).data_state == b'\x00\xff raw'
  saver.close()


def test_keeps_the_newest(tmp_path):
  saver = checkpoint.Checkpointer(tmp_path, keep=2)
  assert saver.restore(small()) is None
  for step in (1, 5, 9, 10):
    saver.save(step, small(step))
  saver.close()
  assert sorted(p.name for p in tmp_path.iterdir()) == ['10', '9']
  with pytest.raises(ValueError, match='at least 1, got 0'):
    checkpoint.Checkpointer(tmp_path, keep=0)


@pytest.fixture(scope='module')
def two_steps(tmp_path_factory):
  """A folder with the good steps 1 and 2, to be copied and damaged."""
  folder = tmp_path_factory.mktemp('two_steps')
  saver = checkpoint.Checkpointer(folder)
  for step in (1, 2):
    saver.save(step, small(step), {'next_index': step}, {'best': step / 10})
  saver.close()
  return folder


def flip(path):
  raw = bytearray(path.read_bytes())
  for i in range(0, len(raw), max(1, len(raw) // 16)):
    raw[i] ^= 0x55
  path.write_bytes(raw)


def zero_middle(path):
  raw = bytearray(path.read_bytes())
  middle = len(raw) // 2
  raw[middle : middle + 8] = bytes(len(raw[middle : middle + 8]))
  path.write_bytes(raw)


def truncate(path):
  path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def empty(path):
  path.write_bytes(b'')


def remove(path):
  path.unlink()


@pytest.mark.parametrize('damage', [flip, zero_middle, truncate, empty, remove])
def test_damage_to_any_file_never_gives_wrong_values(
  two_steps, tmp_path, damage, caplog
):
  names = [p.relative_to(two_steps) for p in (two_steps / '2').rglob('*')]
  names = sorted(name for name in names if (two_steps / name).is_file())
  assert len(names) > 8
  fell_back = set()
  for i, name in enumerate(names):
    folder = tmp_path / str(i)
    shutil.copytree(two_steps, folder)
    damage(folder / name)
    caplog.clear()
    saver = checkpoint.Checkpointer(folder)
    restored = saver.restore(small())
    assert restored is not None, name
    # Files without content that matters (markers) may be lost unnoticed.
    step = restored.step
    assert_same(restored.state, small(step))
    assert restored.data_state == {'next_index': step}
    assert restored.extra == {'best': step / 10}
    if step == 1:
      fell_back.add(name)
      warned = [r for r in caplog.records if 'damaged' in r.getMessage()]
      assert len(warned) == 1
      assert 'step 2' in warned[0].getMessage()
      assert str(folder) in warned[0].getMessage()
    saver.save(2, small(22))  # in place of the damaged one, or not needed
    saver.close()
    saver = checkpoint.Checkpointer(folder)
    assert_same(saver.restore(small()).state, small(22 if step == 1 else 2))
    saver.close()
  assert pathlib.Path('2/record/metadata') in fell_back
  assert any('/d/' in str(name) for name in fell_back)


def test_a_flipped_value_is_named(tmp_path, caplog):
  # Uncompressed by nature: random bits appear in the data file as they are.
  saver = checkpoint.Checkpointer(tmp_path)
  for step in (1, 2):
    saver.save(step, {'big': small(step)['w']})
    saver.wait()
  saver.close()
  data = max((tmp_path / '2').rglob('d/*'), key=lambda p: p.stat().st_size)
  raw = bytearray(data.read_bytes())
  raw[len(raw) // 2] ^= 1
  data.write_bytes(raw)
  saver = checkpoint.Checkpointer(tmp_path)
  assert saver.restore({'big': small()['w']}).step == 1
  saver.close()
  assert 'step 2' in caplog.text


def edit_record(step, change):
  """Changes the record of a step, which stays JSON, and leaves its seal."""
  path = step / 'record' / 'metadata'
  record = json.loads(path.read_text())
  change(record)
  path.write_text(json.dumps(record))


def other_extra(record):
  record['extra']['best'] = 0.9


def other_data(record):
  record['data'] = ['{"json": {"next_index": 7}}']


def other_digest(record):
  record['leaves']['w']['digest'] = record['leaves']['step']['digest']


def fewer_leaves(record):
  del record['leaves']['key']


def other_seal(record):
  record['digest'] = record['digest'][::-1]


def no_seal(record):
  del record['digest']


@pytest.mark.parametrize(
  'change',
  [other_extra, other_data, other_digest, fewer_leaves, other_seal, no_seal],
)
def test_a_record_that_was_edited(two_steps, tmp_path, change, caplog):
  """It reads well, and its seal tells; nothing else would."""
  folder = tmp_path / 'run'
  shutil.copytree(two_steps, folder)
  edit_record(folder / '2', change)
  saver = checkpoint.Checkpointer(folder)
  found = saver.restore(small())
  saver.close()
  assert (found.step, found.extra) == (1, {'best': 0.1})
  assert_same(found.state, small(1))
  assert 'step 2' in caplog.text
  np.testing.assert_array_equal(checkpoint.load(folder)['w'], small(1)['w'])
  edit_record(folder / '1', change)
  with pytest.raises(ValueError, match=r'no checkpoint.*intact \(step 2: '):
    checkpoint.load(folder)


@pytest.mark.parametrize(
  'change',
  [
    lambda x: x.view(np.int32),
    lambda x: x.reshape(30, 40),
    lambda x: x[:-1],
    lambda x: x + 1,
  ],
  ids=['type', 'shape', 'size', 'values'],
)
def test_arrays_are_what_the_record_says(two_steps, monkeypatch, change):
  """Bytes alone do not tell the type or the shape that they are read as."""
  read = checkpoint._read_arrays

  def changed(folder, record):
    leaves = read(folder, record)
    if folder.parent.name == '2':
      leaves['w'] = change(leaves['w'])
    return leaves

  monkeypatch.setattr(checkpoint, '_read_arrays', changed)
  saver = checkpoint.Checkpointer(two_steps)
  assert saver.restore(small()).step == 1
  saver.close()
  np.testing.assert_array_equal(checkpoint.load(two_steps)['w'], small(1)['w'])


def test_paths_that_were_renamed(two_steps, tmp_path):
  """What was saved before a change of names comes back bit for bit."""
  old = small(2)
  new = {
    'w': old['w'],
    'blocks': [{'b': old['layers'][0]['b']}],
    'random': {'key': old['key']},
    'step': old['step'],
  }
  renamed = {'layers/': 'blocks/', 'key': 'random/key'}
  saver = checkpoint.Checkpointer(two_steps)
  blank = jax.tree.map(jnp.zeros_like, new)
  assert_same(saver.restore(blank, renamed).state, new)
  # Today's own paths need no table, and one that has none of them is no harm.
  assert_same(saver.restore(old, {'rest/': 'buffers/'}).state, old)
  with pytest.raises(ValueError, match='blocks/0/b: not in the checkpoint'):
    saver.restore(blank)
  with pytest.raises(ValueError, match=r'two leaves .* renamed to w'):
    saver.restore(blank, {'key': 'w'})
  saver.close()
  found = checkpoint.load(two_steps, renamed)
  assert sorted(found) == ['blocks/0/b', 'random/key', 'step', 'w']
  assert_same(found['random/key'], np.asarray(old['key']))
  with pytest.raises(ValueError, match=r'two leaves .* renamed to w'):
    checkpoint.load(two_steps, {'key': 'w'})
  with pytest.raises(ValueError, match='is intact: there is none'):
    checkpoint.load(tmp_path)


def test_a_wanted_step_and_no_other(two_steps, tmp_path, caplog):
  first = np.asarray(small(1)['w'])
  assert_same(checkpoint.load(two_steps, wanted=1)['w'], first)
  folder = tmp_path / 'damaged'
  shutil.copytree(two_steps, folder)
  remove(folder / '2/record/metadata')
  assert_same(checkpoint.load(folder)['w'], first)
  assert 'Step 1' in caplog.text
  assert 'step 2' in caplog.text
  with pytest.raises(ValueError, match=r'not the one that was scored .*step 2'):
    checkpoint.load(folder, wanted=2)
  with pytest.raises(ValueError, match='step 7 is not there'):
    checkpoint.load(folder, wanted=7)


def test_renaming_takes_the_longest_beginning_once():
  leaves = {'a/b/c': 1, 'a/d': 2, 'b/e': 3}
  renamed = {'a/': 'b/', 'b/': 'a/', 'a/b/': 'x/'}
  assert checkpoint._renamed(leaves, renamed) == {'x/c': 1, 'b/d': 2, 'a/e': 3}
  assert checkpoint._renamed(leaves, None) == leaves


@pytest.mark.parametrize('name', ['2', '2/state', '2/record', '2/state/d'])
def test_missing_folders(two_steps, tmp_path, name):
  folder = tmp_path / 'run'
  shutil.copytree(two_steps, folder)
  shutil.rmtree(folder / name)
  if name == '2':
    (folder / '2').mkdir()  # an empty step folder
  saver = checkpoint.Checkpointer(folder)
  restored = saver.restore(small())
  assert restored.step == 1
  assert_same(restored.state, small(1))
  saver.save(3, small(3))
  saver.close()
  # The damaged step must not push the good one out of the two that are kept.
  assert sorted(p.name for p in folder.iterdir()) == ['1', '3']


def test_a_damaged_step_that_was_saved_again_stays(two_steps, tmp_path):
  folder = tmp_path / 'run'
  shutil.copytree(two_steps, folder)
  truncate(folder / '2' / 'record' / 'metadata')
  saver = checkpoint.Checkpointer(folder)
  assert saver.restore(small()).step == 1
  saver.save(2, small(22))
  saver.save(3, small(3))
  saver.close()
  assert sorted(x.name for x in folder.iterdir()) == ['2', '3']
  np.testing.assert_array_equal(checkpoint.load(folder)['w'], small(3)['w'])


def test_nothing_intact_starts_over(two_steps, tmp_path, caplog):
  folder = tmp_path / 'run'
  shutil.copytree(two_steps, folder)
  for step in '12':
    flip(folder / step / 'record' / 'metadata')
  saver = checkpoint.Checkpointer(folder)
  assert saver.restore(small()) is None
  assert 'No checkpoint' in caplog.text
  assert 'starts over' in caplog.text
  saver.save(1, small(5))
  assert_same(saver.restore(small()).state, small(5))
  saver.close()
  assert [p.name for p in folder.iterdir()] == ['1']


def test_saving_a_damaged_step_without_restoring(two_steps, tmp_path):
  folder = tmp_path / 'run'
  shutil.copytree(two_steps, folder)
  shutil.rmtree(folder / '2' / 'state')
  saver = checkpoint.Checkpointer(folder)
  saver.save(2, small(9))
  assert_same(saver.restore(small()).state, small(9))
  with pytest.raises(ValueError, match='holds the later step 2'):
    saver.save(0, small(0))
  saver.save(2, small(0))  # saved already: nothing happens
  assert_same(saver.restore(small()).state, small(9))
  saver.close()


def test_killed_while_saving(two_steps, tmp_path):
  folder = tmp_path / 'run'
  shutil.copytree(two_steps, folder)
  code = f"""
    import os
    import numpy as np
    from distillfss_jax.workdir import checkpoint
    saver = checkpoint.Checkpointer({str(folder)!r})
    saver.save(3, {{'w': np.random.default_rng(0).normal(size=(3000, 1000))}})
    os._exit(9)
  """
  root = pathlib.Path(__file__).parents[1]
  done = subprocess.run(
    [sys.executable, '-c', textwrap.dedent(code)], cwd=root, check=False
  )
  assert done.returncode == 9
  assert list(folder.glob('3*tmp*'))  # cut short, as intended
  saver = checkpoint.Checkpointer(folder)
  assert saver.restore(small()).step == 2
  assert list(folder.glob('3*tmp*'))  # a reader leaves a living save alone
  saver.save(4, small(4))
  assert not list(folder.glob('3*tmp*'))
  saver.close()
  assert sorted(p.name for p in folder.iterdir()) == ['2', '4']


def test_another_model_is_an_error_not_damage(two_steps):
  saver = checkpoint.Checkpointer(two_steps)
  other = {**small(), 'w': jnp.zeros((40, 31)), 'new': jnp.zeros(3)}
  del other['key']
  with pytest.raises(ValueError, match='another model or optimiser') as error:
    saver.restore(other)
  text = str(error.value)
  assert 'new: not in the checkpoint' in text
  assert 'key: in the checkpoint only' in text
  assert '[40, 30]' in text
  assert '[40, 31]' in text
  with pytest.raises(ValueError, match='layers/0/b'):
    saver.restore({**small(), 'layers': [{'b': jnp.zeros(7)}]})
  saver.close()


def test_refuses_what_is_no_state(tmp_path):
  saver = checkpoint.Checkpointer(tmp_path)
  with pytest.raises(TypeError, match='name is a str'):
    saver.save(1, {'name': 'x'})
  for x in (3, np.asarray(['x']), np.asarray([None]), jax.random.key(0)):
    with pytest.raises(TypeError, match=r'a/0 is a .* only arrays of numbers'):
      saver.save(1, {'a': [x]})
  with pytest.raises(TypeError, match='JSON'):
    saver.save(1, small(), extra={'x': object()})
  with pytest.raises(ValueError, match='same path'):
    saver.save(1, {'a/b': jnp.zeros(1), 'a': {'b': jnp.zeros(1)}})
  saver.close()


def test_what_is_no_damage_is_not_hidden(two_steps, monkeypatch):
  def forbidden(*_):
    raise PermissionError('not yours')

  saver = checkpoint.Checkpointer(two_steps)
  monkeypatch.setattr(checkpoint, '_read_arrays', forbidden)
  with pytest.raises(PermissionError, match='not yours'):
    saver.restore(small())
  saver.close()


@pytest.mark.parametrize('words', [False, True])
@pytest.mark.parametrize('code', [errno.EMFILE, errno.ESTALE])
def test_a_file_system_that_does_not_answer(
  two_steps, monkeypatch, code, words
):
  """The newest step is not passed over for it, nor deleted."""
  said = f'tensorstore: {os.strerror(code)}'
  error = ValueError(said) if words else OSError(code, said)

  def fails(*_):
    raise error

  saver = checkpoint.Checkpointer(two_steps)
  monkeypatch.setattr(checkpoint, '_read_arrays', fails)
  with pytest.raises(OSError, match='try again when the file'):
    saver.restore(small())
  saver.close()


def test_a_disk_that_fails(two_steps, tmp_path, monkeypatch):
  """The older step does; where none is left, nothing starts over."""
  place = tmp_path / 'run'
  shutil.copytree(two_steps, place)
  read, failing = checkpoint._read_arrays, {1, 2}

  def fails(folder, record):
    if int(folder.parent.name) in failing:
      raise OSError(errno.EIO, 'Input/output error')
    return read(folder, record)

  monkeypatch.setattr(checkpoint, '_read_arrays', fails)
  saver = checkpoint.Checkpointer(place)
  with pytest.raises(OSError, match='cannot read the checkpoint of step 2'):
    saver.restore(small())
  saver.close()
  assert sorted(x.name for x in place.iterdir()) == ['1', '2']
  failing.remove(1)
  saver = checkpoint.Checkpointer(place)
  assert saver.restore(small()).step == 1
  saver.close()


def test_folder_that_cannot_be_made(tmp_path):
  (tmp_path / 'file').write_text('')
  with pytest.raises(OSError, match='cannot write checkpoints into') as error:
    checkpoint.Checkpointer(tmp_path / 'file' / 'checkpoints')
  assert str(tmp_path / 'file' / 'checkpoints') in str(error.value)


def test_full_disk(tmp_path):
  """A limit on the size of files stands for a disk without room."""
  saver = checkpoint.Checkpointer(tmp_path)
  saver.save(1, small(1))
  saver.wait()
  soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
  try:
    big = {'w': np.random.default_rng(0).normal(size=100_000)}
    with pytest.raises(OSError, match='cannot write checkpoints') as error:
      save_and_wait(saver, 2, big)
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
  assert str(tmp_path) in str(error.value)
  assert error.value.errno in (errno.EIO, errno.EFBIG)
  again = checkpoint.Checkpointer(tmp_path)
  assert_same(again.restore(small()).state, small(1))
  again.close()
  # With room again, the same step may be tried again.
  save_and_wait(saver, 2, big)
  assert saver.restore(big).step == 2
  saver.close()


def test_other_number_of_processes(tmp_path):
  texts = [json.dumps({'json': i}) for i in (1, 2)]
  with pytest.raises(ValueError, match='2 processes, this run has 1'):
    checkpoint._unpack(texts)
  assert checkpoint._unpack([texts[1], texts[1]]) == 2


def test_two_processes(tmp_path):
  code = """
    import os, sys
    import jax, numpy as np
    port, process, folder = sys.argv[1], int(sys.argv[2]), sys.argv[3]
    jax.distributed.initialize(f'127.0.0.1:{port}', 2, process)
    from distillfss_jax.workdir import checkpoint
    mesh = jax.sharding.Mesh(np.array(jax.devices()), ('data',))
    whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    def state(value):
      return {'w': jax.make_array_from_callback(
          (4,), whole, lambda i: np.full(4, value, np.float32)[i])}
    saver = checkpoint.Checkpointer(folder)
    for step in (1, 2):
      saver.save(step, state(step), {'next_index': 10 * step + process})
      saver.wait()
    saver.close()
    if process == 0:
      path = os.path.join(folder, '2', 'record', 'metadata')
      os.truncate(path, 10)
    jax.experimental.multihost_utils.sync_global_devices('damaged')
    saver = checkpoint.Checkpointer(folder)
    found = saver.restore(state(0))
    assert found.step == 1, found.step
    assert found.data_state == {'next_index': 10 + process}
    assert np.all(np.asarray(found.state['w']) == 1)
    assert found.state['w'].sharding == whole
    saver.save(2, state(5))
    saver.close()
    # What only one of them cannot read, none of them takes.
    if process == 1:
      read = checkpoint._read_arrays
      def fails(path, record):
        if path.parent.name == '2':
          raise ValueError('the file did not reach this machine')
        return read(path, record)
      checkpoint._read_arrays = fails
    saver = checkpoint.Checkpointer(folder)
    assert saver.restore(state(0)).step == 1
    saver.close()
    print('fine', flush=True)
    jax.distributed.shutdown()
  """
  import socket

  with socket.socket() as free:
    free.bind(('127.0.0.1', 0))
    port = free.getsockname()[1]
  root = pathlib.Path(__file__).parents[1]
  runs = [
    subprocess.Popen(
      [sys.executable, '-c', textwrap.dedent(code), str(port), str(i),
       str(tmp_path / 'run')],
      cwd=root, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )
    for i in range(2)
  ]  # fmt: skip
  said = [run.communicate(timeout=120)[0] for run in runs]
  assert all('fine' in text for text in said), '\n'.join(said)


def test_flax_dataclasses_have_readable_paths():
  @flax.struct.dataclass
  class Pair:
    left: int
    right: list

  assert list(checkpoint._paths(Pair(1, [2, {'x': 3}]))) == [
    'left', 'right/0', 'right/1/x',
  ]  # fmt: skip
