"""The scripts for clusters, against stand-ins for the commands they call."""

import os
import pathlib
import signal
import stat
import subprocess
import sys
import time

import pytest
import test_cluster
import yaml
from conftest import ROOT

# A run that says how it was started, waits for SIGTERM if told to, and ends as
# told.
RUN = """#!/usr/bin/env bash
if [[ ${WAIT-} ]]; then trap 'exit 75' TERM; fi
echo "$@" >>"$SEEN"
if [[ ${SAVE-} ]]; then mkdir -p "$SAVE"; fi
while [[ ${WAIT-} ]]; do sleep 0.01; done
exit ${STATUS-0}
"""
# Two tasks, as srun would start them on two nodes; the worst code is its own.
SRUN = """#!/usr/bin/env bash
shift # --kill-on-bad-exit=1
export SLURM_JOB_ID=4242 SLURM_STEP_NODELIST=localhost SLURM_NTASKS=2
export SLURM_STEP_NUM_NODES=1
for i in 0 1; do
  SLURM_PROCID=$i SLURM_LOCALID=$i "$@" & tasks+=($!)
done
echo "${tasks[@]}" >"$SEEN.tasks"
status=0
for task in "${tasks[@]}"; do
  wait "$task"; code=$?
  ((code > status)) && status=$code
done
exit "$status"
"""
SCANCEL = """#!/usr/bin/env bash
echo "scancel $@" >>"$SEEN"
for task in $(<"$SEEN.tasks"); do # all processes of a step
  pkill -TERM -P "$task"
  kill -TERM "$task"
done
"""
SCONTROL = """#!/usr/bin/env bash
echo "scontrol $@" >>"$SEEN"
"""


@pytest.fixture
def stand_ins(tmp_path):
  """Commands on PATH; returns the environment to start scripts in."""
  made = {'srun': SRUN, 'scancel': SCANCEL, 'scontrol': SCONTROL, 'run': RUN}
  folder = tmp_path / 'bin'
  folder.mkdir()
  for name, text in made.items():
    write(folder / name, text)
  return {
    **os.environ,
    'PATH': f'{folder}:{os.environ["PATH"]}',
    'SEEN': str(tmp_path / 'seen'),
    'PYTHON': str(folder / 'run'),
    'SLURM_SUBMIT_DIR': str(tmp_path),
    'SLURM_JOB_ID': '4242',
  }


def write(path, text):
  path.write_text(text)
  path.chmod(path.stat().st_mode | stat.S_IXUSR)


def seen(environment):
  path = pathlib.Path(environment['SEEN'])
  return path.read_text().splitlines() if path.exists() else []


def slurm(environment, *arguments, **more):
  return subprocess.run(
    ['bash', ROOT / 'launch/slurm.sh', *arguments],
    env={**environment, **more},
    capture_output=True,
    text=True,
    timeout=600,
    check=False,
  )


def test_slurm_starts_one_program_per_task(stand_ins):
  done = slurm(stand_ins, '--config', 'c.py', '--workdir=runs/x')
  assert done.returncode == 0, done.stderr
  line = (
    '-u -m distillfss_jax.main --distributed --config c.py --workdir=runs/x'
  )
  assert seen(stand_ins) == [line, line]


@pytest.mark.parametrize('arguments', [[], ['--workdir'], ['--workdir=']])
def test_slurm_needs_a_folder(stand_ins, arguments):
  done = slurm(stand_ins, '--config', 'c.py', *arguments)
  assert done.returncode == 1
  assert done.stderr.startswith('error: give --workdir')
  assert not seen(stand_ins)


@pytest.mark.parametrize('status', [75, 134, 137])
def test_slurm_queues_a_stopped_run_again(stand_ins, status):
  done = slurm(stand_ins, '--workdir', 'x', STATUS=str(status))
  assert done.returncode == status
  assert seen(stand_ins)[-1] == 'scontrol requeue 4242'


def test_slurm_leaves_an_error(stand_ins):
  done = slurm(stand_ins, '--workdir', 'x', STATUS='1')
  assert done.returncode == 1
  assert 'requeue' not in seen(stand_ins)[-1]


def test_slurm_gives_up_without_progress(stand_ins, tmp_path):
  """After three times in a row; a new checkpoint is a new start."""

  def stopped(**more):
    done = slurm(stand_ins, '--workdir', 'new/x/', STATUS='75', **more)
    assert done.returncode == 75
    return seen(stand_ins)[-1] == 'scontrol requeue 4242', done.stderr

  for step in ('10', '20'):
    assert stopped(SAVE=f'new/x/checkpoints/{step}')[0]
    for _ in range(3):
      assert stopped()[0]
  again, said = stopped()
  assert not again
  assert '75, 4 times without a new checkpoint' in said
  assert stopped()[0]  # somebody started it anew
  assert slurm(stand_ins, '--workdir', 'new/x').returncode == 0
  assert not list(tmp_path.rglob('*.stalls'))


def test_slurm_tells_srun_of_the_cores(stand_ins):
  pathlib.Path(stand_ins['PYTHON']).write_text(
    RUN.replace('$@', '$SRUN_CPUS_PER_TASK')
  )
  assert not slurm(stand_ins, '--workdir', 'x').returncode
  assert not slurm(
    stand_ins, '--workdir', 'x', SLURM_CPUS_PER_TASK='8'
  ).returncode
  assert seen(stand_ins) == ['', '', '8', '8']


@pytest.mark.parametrize('again', range(5))  # what comes when is chance
def test_slurm_saves_when_time_is_up(stand_ins, again):
  with subprocess.Popen(
    ['bash', ROOT / 'launch/slurm.sh', '--workdir', 'x'],
    env={**stand_ins, 'WAIT': '1'},
    stderr=subprocess.PIPE,
  ) as job:
    until = time.monotonic() + 300
    while len(seen(stand_ins)) < 2 and time.monotonic() < until:
      time.sleep(0.02)
    job.send_signal(signal.SIGUSR1)
    assert job.wait(300) == 75
    job.stderr.close()
  assert seen(stand_ins)[2:] == [
    'scancel --signal=TERM 4242',
    'scontrol requeue 4242',
  ]


@pytest.mark.slow
def test_processes_find_each_other_under_slurm(stand_ins, tmp_path):
  """The real program, told of the others by SLURM's variables alone."""
  done = slurm(
    stand_ins,
    *test_cluster.CONFIG,
    f'--workdir={tmp_path}/runs/x',
    PYTHON=sys.executable,
    SLURM_SUBMIT_DIR=str(ROOT),
    JAX_PLATFORMS='cpu',
  )
  assert done.returncode == 0, done.stderr[-3000:]
  assert (tmp_path / 'runs/x/results.json').exists()
  assert len(list((tmp_path / 'runs/x').glob('log.*.INFO.*'))) == 2


GCLOUD = """#!/usr/bin/env bash
printf '%s\\n' "$*" >>"$SEEN"
(($(wc -l <"$SEEN") > 2)) && exit 0
exit 75
"""


def test_tpu_starts_a_stopped_run_again(stand_ins, tmp_path):
  write(tmp_path / 'bin/gcloud', GCLOUD)
  done = subprocess.run(
    ['bash', ROOT / 'launch/tpu.sh', '--config', "c.py:a='b c'"],
    env={**stand_ins, 'TPU': 'slice', 'ZONE': 'here', 'PAUSE': '0'},
    capture_output=True,
    text=True,
    timeout=60,
    check=False,
  )
  assert done.returncode == 0, done.stderr
  assert done.stderr.count('stopped with 75') == 2
  lines = seen(stand_ins)
  assert len(lines) == 3
  for part in (
    'ssh slice --zone here',
    '--worker=all',
    'exec .venv/bin/python -u -m distillfss_jax.main --distributed',
    r"'c.py:a='\''b c'\'''",  # quoted for the shell over there
  ):
    assert part in lines[0]


def test_tpu_needs_a_slice(stand_ins):
  done = subprocess.run(
    ['bash', ROOT / 'launch/tpu.sh'],
    env={k: v for k, v in stand_ins.items() if k not in ('TPU', 'ZONE')},
    capture_output=True,
    text=True,
    check=False,
  )
  assert done.returncode != 0
  assert 'the name of the slice' in done.stderr


def test_kubernetes():
  """Names and numbers that have to agree do, and the flags exist."""
  text = (ROOT / 'launch/k8s.yaml').read_text()
  service, job = yaml.safe_load_all(text)
  spec, name = job['spec'], job['metadata']['name']
  pod = spec['template']['spec']
  [main] = pod['containers']
  flags = dict(x[2:].split('=', 1) for x in main['command'] if '=' in x)
  assert spec['completionMode'] == 'Indexed'
  assert spec['completions'] == spec['parallelism']
  assert int(flags['num_processes']) == spec['completions']
  port = main['ports'][0]['containerPort']
  assert flags['coordinator'] == f'{name}-0.{pod["subdomain"]}:{port}'
  assert service['metadata']['name'] == pod['subdomain']
  assert service['spec']['clusterIP'] == 'None'
  assert service['spec']['selector'] == {'job-name': name}
  assert flags['process_id'] == f'$({main["env"][0]["name"]})'
  assert (ROOT / flags['config'].partition(':')[0]).exists()
  assert flags['workdir'].startswith(main['volumeMounts'][0]['mountPath'])
  codes = {
    rule['action']: rule['onExitCodes']['values']
    for rule in spec['podFailurePolicy']['rules']
    if 'onExitCodes' in rule
  }
  assert 75 in codes['Ignore']
  assert codes['FailJob'] == [1]
  # Else an abort is 139 there, and SIGTERM is not heard at first.
  assert pod['shareProcessNamespace'] is True
