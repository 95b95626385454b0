"""One process at a time in a run's folder, and signals that end it well."""

import errno
import json
import os
import pathlib
import signal
import subprocess
import sys
import threading
import time

import pytest

from distillfss_jax import files
from distillfss_jax.workdir import locking, signals

ELSEWHERE = {'host': 'far', 'boot': 'b', 'pid': 7, 'started': '1', 'token': 't'}


@pytest.fixture
def quick(monkeypatch):
  """Signs of life every 50 ms; dead after 500 without."""
  monkeypatch.setattr(locking, 'BEAT', 0.05)
  monkeypatch.setattr(locking, 'SILENCE', 0.5)


def write(folder, **owner):
  text = json.dumps({**ELSEWHERE, **owner})
  files.write_atomically(folder / 'lock', text)


def here(**other):
  """What a lock of this process says."""
  return {**locking._me(), **other}


def test_a_folder_has_one_owner(tmp_path):
  with locking.Lock(tmp_path) as lock:
    lock.check()
    said = json.loads((tmp_path / 'lock').read_text())
    assert said['pid'] == os.getpid()
    with (
      pytest.raises(ValueError, match=f'in use by process {os.getpid()} on'),
      locking.Lock(tmp_path),
    ):
      pass
  assert not list(tmp_path.iterdir())
  with locking.Lock(tmp_path):  # a folder can be locked again
    pass


def test_another_process_of_this_machine(tmp_path):
  code = (
    'import sys, time; from distillfss_jax.workdir import locking\n'
    'with locking.Lock(sys.argv[1]): print("mine", flush=True); time.sleep(99)'
  )
  with subprocess.Popen(
    [sys.executable, '-c', code, str(tmp_path)], stdout=subprocess.PIPE
  ) as owner:
    assert owner.stdout.readline() == b'mine\n'
    with (
      pytest.raises(ValueError, match=f'process {owner.pid} on .* --workdir'),
      locking.Lock(tmp_path),
    ):
      pass
    owner.kill()
  assert (tmp_path / 'lock').exists()
  begin = time.monotonic()
  with locking.Lock(tmp_path):  # the killed one is known to be dead at once
    assert time.monotonic() - begin < locking.SILENCE / 3


@pytest.mark.parametrize(
  'owner',
  [
    here(started='12'),  # its number is that of this process by chance
    here(pid=2**22 + 1),  # no process has it
    {'host': 'half'},
  ],
)
def test_stale_locks_of_this_machine(tmp_path, owner):
  (tmp_path / 'lock').write_text(json.dumps(owner))
  with locking.Lock(tmp_path):
    said = json.loads((tmp_path / 'lock').read_text())
    assert said['token'] != owner.get('token')


def test_an_unreadable_lock(tmp_path):
  (tmp_path / 'lock').write_text('{"host": "fa')
  with locking.Lock(tmp_path):
    pass


def test_an_owner_elsewhere_that_lives(tmp_path):
  write(tmp_path, count=0)
  ended = threading.Event()

  def live():
    count = 0
    while not ended.wait(0.1):
      count += 1
      write(tmp_path, count=count)

  thread = threading.Thread(target=live)
  thread.start()
  with (
    pytest.raises(ValueError, match='in use by process 7 on far'),
    locking.Lock(tmp_path),
  ):
    pass
  ended.set()
  thread.join()


def test_an_owner_elsewhere_that_leaves(tmp_path, monkeypatch):
  write(tmp_path, count=0)
  sleep = time.sleep

  def leave(seconds):
    (tmp_path / 'lock').unlink(missing_ok=True)
    sleep(0.01)

  monkeypatch.setattr(locking.time, 'sleep', leave)
  with locking.Lock(tmp_path):  # the folder is free
    monkeypatch.undo()


def test_a_lock_that_is_replaced_while_it_is_read(tmp_path, monkeypatch):
  """As NFS says it: it is as if it were gone."""
  with locking.Lock(tmp_path) as lock:

    def stale(*args, **kwargs):
      raise OSError(errno.ESTALE, 'Stale file handle')

    monkeypatch.setattr(pathlib.Path, 'open', stale)
    monkeypatch.setattr(pathlib.Path, 'read_bytes', stale)
    assert locking._owner(tmp_path / 'lock') is None
    assert lock._look() is None
    monkeypatch.undo()
    assert locking._owner(tmp_path / 'lock')['pid'] == os.getpid()


def test_an_owner_elsewhere_that_is_silent(tmp_path, quick, capsys):
  write(tmp_path, count=3)
  # Clocks of machines differ: a time in the future means nothing.
  os.utime(tmp_path / 'lock', (time.time() + 1e6,) * 2)
  with locking.Lock(tmp_path):
    assert 'looking whether it lives' in capsys.readouterr().err
    assert json.loads((tmp_path / 'lock').read_text())['pid'] == os.getpid()


def test_the_owner_gives_signs_of_life(tmp_path, quick):
  with locking.Lock(tmp_path):
    counts = set()
    until = time.monotonic() + 60
    while len(counts) < 3 and time.monotonic() < until:
      counts.add(json.loads((tmp_path / 'lock').read_text())['count'])
      time.sleep(0.02)
  assert len(counts) >= 3
  assert not list(tmp_path.iterdir())


def test_a_folder_that_was_taken_over(tmp_path, quick):
  with locking.Lock(tmp_path) as lock:
    until = time.monotonic() + 60
    while not lock._lost and time.monotonic() < until:
      write(tmp_path)  # again, if a sign of life was on its way
      time.sleep(0.02)
    with pytest.raises(ValueError, match='was taken over by process 7 on far'):
      lock.check()
  assert (tmp_path / 'lock').exists()  # it is the other's


def storm(folder, count=8):
  """Asks for a folder from many sides at once; how many had it together."""
  barrier, guard = threading.Barrier(count), threading.Lock()
  inside, most, taken, refused = 0, 0, [], []

  def take():
    nonlocal inside, most
    barrier.wait()
    try:
      with locking.Lock(folder):
        with guard:
          inside += 1
          most = max(most, inside)
          taken.append(1)
        # Until all others were refused, so that none of them comes too late.
        until = time.monotonic() + 60
        while len(refused) < count - 1 and most == 1:
          assert time.monotonic() < until
          time.sleep(0.001)
        with guard:
          inside -= 1
    except locking.InUseError:
      refused.append(1)

  threads = [threading.Thread(target=take) for _ in range(count)]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  return most, len(taken), len(refused)


def no_links(*args):
  raise OSError(errno.EPERM, 'not here')


@pytest.mark.parametrize('links', [True, False])
def test_of_many_one_takes_a_stale_lock(tmp_path, monkeypatch, links):
  if not links:
    monkeypatch.setattr(os, 'link', no_links)
  for i in range(20):
    folder = tmp_path / f'{i}'
    folder.mkdir()
    write(folder, **here(started='12'))
    assert storm(folder) == (1, 1, 7)
    assert not list(folder.iterdir())


def test_a_lock_that_is_being_made_is_not_stale(tmp_path, monkeypatch):
  """Of the way without links: somebody comes between its file and its text."""
  monkeypatch.setattr(os, 'link', no_links)
  slow = locking.Lock(tmp_path)
  opened, texts = threading.Event(), [slow._text(0)]

  def slowly(count):
    if texts:
      return texts.pop()  # the one that is to be linked
    opened.set()
    time.sleep(0.5)
    return locking.Lock._text(slow, count)

  monkeypatch.setattr(slow, '_text', slowly)
  owners = []
  thread = threading.Thread(target=lambda: owners.append(slow.__enter__()))
  thread.start()
  assert opened.wait(60)
  with pytest.raises(locking.InUseError), locking.Lock(tmp_path):
    pass
  thread.join()
  slow.check()
  slow.__exit__()
  assert owners == [slow]
  assert not list(tmp_path.iterdir())


def test_a_signal_waits_for_the_step(capfd, monkeypatch):
  with signals.Stop() as stop, stop.deferred():
    assert stop.wanted == 0
    signal.raise_signal(signal.SIGTERM)
    assert stop.wanted == signal.SIGTERM
    assert 'SIGTERM: stopping when the step' in capfd.readouterr().err
    signal.raise_signal(signal.SIGTERM)  # the same, by another way
    monkeypatch.setattr(signals, 'ECHO', 0)
    with pytest.raises(signals.Stopped, match='SIGTERM') as second:
      signal.raise_signal(signal.SIGTERM)
  assert second.value.code == 75


@pytest.mark.parametrize(
  ('signum', 'code'), [(signal.SIGTERM, 75), (signal.SIGINT, 130)]
)
def test_elsewhere_a_signal_ends_at_once(signum, code):
  before = signal.getsignal(signum)
  with signals.Stop() as stop:
    with stop.deferred():
      pass
    with pytest.raises(signals.Stopped) as stopped:
      signal.raise_signal(signum)
  assert stopped.value.code == code
  assert signal.getsignal(signum) is before


def test_nobody_takes_it_for_an_error():
  assert not issubclass(signals.Stopped, Exception)


def test_another_container_of_this_machine(tmp_path, quick, monkeypatch):
  """Whose first process is number 1, too, and may live."""
  monkeypatch.setattr(locking, '_namespace', lambda: ' pid:[2]')
  owner = here(token='t', pid=os.getpid())
  monkeypatch.undo()
  monkeypatch.setattr(locking, 'SILENCE', 0.5)
  (tmp_path / 'lock').write_text(json.dumps({**owner, 'started': '1'}))
  begin = time.monotonic()
  with locking.Lock(tmp_path):
    assert time.monotonic() - begin >= 0.5  # it was watched for signs of life


def test_other_threads_hear_no_signals():
  done = []

  def work():
    with signals.Stop() as stop, stop.deferred():
      done.append(stop.wanted)

  thread = threading.Thread(target=work)
  thread.start()
  thread.join()
  assert done == [0]
