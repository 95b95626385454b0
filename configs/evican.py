"""DistillFSS on EVICAN, few shots of cells and nuclei.

    python -m distillfss_jax.prepare --dataset evican --raw EVICAN
    python -m distillfss_jax.main --config configs/evican.py:shots=8

Arguments after the colon: see `common.ARGUMENTS`. The paper's tables leave it
out, and there is no published score: steps and shots are those that the
original's configuration has for it, which cannot be run as it is. Its 8 images
are listed there by their ids, or drawn anew in each run; here
--config.support.seed draws them, always the same.
"""

from configs import common


def get_config(arg=None):
  """The original's settings; see the module's docstring for `arg`."""
  config, arg = common.benchmark(
    arg, 'evican', steps=1000, shots=8, subsample=3, rule='random'
  )
  return common.done(config, arg)
