"""Pages for a browser, as a run and a sweep leave them, without training."""

import json

import numpy as np
from PIL import Image

from configs import nucleus
from distillfss_jax.datasets import synthetic
from distillfss_jax.workdir import pictures, report
from launch import collect

RESULTS = {
  'name': 'demo',
  'steps': 4,
  'test_images': 3,
  'test': {
    'student': {'miou': 0.5, 'iou': {'a<b': 0.5, 'c': None}},
    'teacher': {'miou': 0.25, 'iou': {'a<b': 0.25, 'c': 0.1}},
  },
  'evaluations': {
    'test': {'says': 'at the size & so on', 'columns': {'miou': 'mIoU'}}
  },
  'references': {
    'untrained': {'student': {'miou': 0.1}},
    'brightness': {'miou': 0.2},
  },
  'notes': ['a note'],
  'versions': {'jax': '1.0'},
  'device': 'cpu',
  'seconds': {'adapt': 1},
}
COMMAND = 'python -m x "<y>"'


def of_run(folder, scores):
  """Writes the page of a run into its folder; returns its path.

  Args:
    folder: of the run.
    scores: {id of a test image: the student's mIoU or None}.
  """
  data = synthetic.load(num_train=2, num_test=len(scores), classes=2)
  answers = []
  for name, score, record in zip(
    scores, scores.values(), data.test, strict=True
  ):
    image, truth = record['image'], record['label'].copy()
    truth[:4, :4] = 255
    student = np.roll(truth, 5, 1)
    student[student == 255] = 0
    # Less sure where it is wrong.
    sure = np.where(student == truth, 250, 120).astype(np.uint8)
    answers.append(
      report.Answered(
        name,
        image,
        {'truth': truth, 'teacher': np.roll(student, 3, 0), 'student': student},
        {'teacher': 0.5, 'student': score},
        data.classes,
        data.palette,
        {'teacher': sure[::-1], 'student': sure},
      )
    )
  support = [data.train[i] for i in range(2)]
  panels = folder / 'panels'
  pictures.save(
    panels / 'support.png',
    pictures.support_panel(
      [x['image'] for x in support],
      [x['label'] for x in support],
      palette=data.palette,
    ),
  )
  Image.new('RGB', (400, 200), (230, 230, 240)).save(panels / 'curves.png')
  report.write(folder, RESULTS, answers, command=COMMAND)
  return folder / 'report.html'


def of_sweep(root, scores):
  """Writes runs below `root/runs` and the page of them; returns its path.

  Args:
    root: a folder.
    scores: {(shots, seed): the student's mIoU}.
  """
  for (shots, seed), score in scores.items():
    folder = root / 'runs' / f'{shots}-{seed}'
    folder.mkdir(parents=True)
    config = nucleus.get_config(f'shots={shots},seed={seed}')
    (folder / 'config.json').write_text(config.to_json_best_effort())
    found = {'test': {x: {'miou': score} for x in ('student', 'teacher')}}
    (folder / 'results.json').write_text(json.dumps(found))
    (folder / 'report.html').write_text(report.page('A run', ()))
  collect.main([str(root / 'runs'), '--out', str(root / 'tables')])
  return root / 'tables' / 'report.html'
