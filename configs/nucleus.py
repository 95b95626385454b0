"""DistillFSS on Nucleus (Data Science Bowl 2018), few shots of nuclei.

    python -m distillfss_jax.prepare --dataset nucleus --raw stage1_train.zip
    python -m distillfss_jax.main --config configs/nucleus.py:shots=5

Arguments after the colon, separated by commas:

    method=distill|transfer  shots=5|10|25|50  backbone=swin_b|resnet50
    student=full|light|attention  seed=0  smoke

Published test mIoU (the best of a grid, selected on the test set), 5/10/25/50
shots: DistillFSS Swin-B 69.6/71.2/68.2/80.0, ResNet-50 12.8/20.7/25.2/21.1;
TransferFSS Swin-B 73.1/79.0/69.5/79.4. Those start from DCAMA weights trained
on PASCAL; from random weights see the README.
"""

from configs import common


def get_config(arg=None):
  """The paper's settings; see the module's docstring for `arg`."""
  arg = common.parse(
    arg,
    method=('distill', 'transfer'),
    shots=int,
    backbone=('swin_b', 'resnet50'),
    student=('full', 'light', 'attention'),
    seed=int,
    smoke=False,
    defaults={'shots': 5, 'seed': 0},
  )
  config = common.get_config()
  with config.unlocked():
    config.data.args.data_dir = 'data'
    config.data.args.split = 'frozen'
  config.name = 'nucleus'
  config.data.name = 'nucleus'
  config.data.image_size = 384
  config.support.shots = arg.shots
  config.model.backbone.name = arg.backbone
  config.student = arg.student
  config.seed = arg.seed
  config.steps = 2500
  if arg.method == 'transfer':
    config.system = 'transferfss'
    config.model.voting = 10
    config.optim.trainable = ('D',)
  return common.smoke(config) if arg.smoke else config


def sweep():
  """The grid behind the paper's row."""
  for method in ('distill', 'transfer'):
    for shots in (5, 10, 25, 50):
      for backbone in ('swin_b', 'resnet50'):
        yield {'method': method, 'shots': shots, 'backbone': backbone}
