"""DistillFSS on DeepGlobe, few shots of land cover in satellite images.

    python -m distillfss_jax.prepare --dataset deepglobe --raw land-train
    python -m distillfss_jax.main --config configs/deepglobe.py:shots=6

Arguments after the colon: see `common.ARGUMENTS`. Shots are divided among the
classes: a multiple of 6. The paper's tables leave it out: these are settings of
the original's configuration, which has TransferFSS only, on five tiles that it
names.
"""

from configs import common


def get_config(arg=None):
  """The original's settings; see the module's docstring for `arg`."""
  config, arg = common.benchmark(arg, 'deepglobe', steps=500, shots=6)
  config.support.rule = 'per_class'
  config.optim.trainable = tuple(
    'A' if name == 'D' else name for name in config.optim.trainable
  )
  return common.done(config, arg)
