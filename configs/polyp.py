"""DistillFSS on PraNet's polyps, few shots of its training set.

    python -m distillfss_jax.prepare --dataset polyp --raw polyps
    python -m distillfss_jax.main --config configs/polyp.py:shots=5,test=Kvasir

Arguments after the colon: test=all|CVC-300|CVC-ClinicDB|Kvasir|CVC-ColonDB|
ETIS-LaribPolypDB, what is tested, and `common.ARGUMENTS`.

The paper has no such experiment: settings are those of configs/kvasir.py, and
there is no published score of DistillFSS. Scores of 'all' count the pixels of
the five sets together, of which half of the images are of CVC-ColonDB.
"""

from configs import common

TESTS = (
  'CVC-300', 'CVC-ClinicDB', 'Kvasir', 'CVC-ColonDB', 'ETIS-LaribPolypDB',
)  # fmt: skip


def get_config(arg=None):
  """The settings of Kvasir; see the module's docstring for `arg`."""
  config, arg = common.benchmark(
    arg, 'polyp', steps=1000, known={'test': ('all', *TESTS)}
  )
  with config.unlocked():
    config.data.args.test = arg.test
  return common.done(config, arg)


def sweep():
  """The grid of Kvasir, over all test sets."""
  return common.grid(shots=(5, 10, 25, 50), test=TESTS)
