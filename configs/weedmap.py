"""DistillFSS on WeedMap (RedEdge), few shots of crop and weed from the air.

    python -m distillfss_jax.prepare --dataset weedmap --raw RedEdge
    python -m distillfss_jax.main --config configs/weedmap.py:shots=5

Arguments after the colon: see `common.ARGUMENTS`.

Published test mIoU (the best of a grid, selected on the test set; scored at the
tiles' own 256 pixels: test_native), 5/10/25/50 shots: DistillFSS Swin-B
44.4/55.4/59.4/62.0, ResNet-50 32.4/48.0/48.4/54.5; TransferFSS Swin-B 51.0 (5)
and 64.2 (50).
Those start from DCAMA weights trained on PASCAL (--config.model.init).

Parity: the original's loss shrinks predictions to these 256 pixels; here labels
grow to the model's size for training, as those of other datasets shrink to it.
"""

from configs import common


def get_config(arg=None):
  """The paper's settings; see the module's docstring for `arg`."""
  config, arg = common.benchmark(arg, 'weedmap', steps=1000, kind='paired')
  with config.unlocked():
    config.data.args.remove_black_images = False  # tiles beyond the field
  return common.done(config, arg)


def sweep():
  """The grid behind the paper's row."""
  return common.grid(shots=(5, 10, 25, 50))
