"""DistillFSS on Chest X-ray, few shots of lungs.

    python -m distillfss_jax.prepare --dataset chestxray --raw archive.zip
    python -m distillfss_jax.main --config configs/chestxray.py:shots=5

Arguments after the colon: see `common.ARGUMENTS`.

The paper has no such experiment: settings are those of configs/kvasir.py, and
there is no published score of DistillFSS. Another method's, in episodes over
all images instead of a held-out part, foreground IoU at 400x400: IFA ResNet-50
74.0 (1 shot) and 74.6 (5 shots), the best of its epochs on the test episodes.
"""

from configs import common


def get_config(arg=None):
  """The settings of Kvasir; see the module's docstring for `arg`."""
  config, arg = common.benchmark(arg, 'chestxray', steps=1000)
  return common.done(config, arg)


def sweep():
  """The grid of Kvasir."""
  return common.grid(shots=(5, 10, 25, 50))
