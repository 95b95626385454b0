"""DistillFSS on one class of FSS-1000, up to 5 shots of it.

    python -m distillfss_jax.prepare --dataset fss1000 --raw fewshot_data.zip
    python -m distillfss_jax.main --config configs/fss1000.py:category=bus

Arguments after the colon: category=NAME, which class ('' for the first of those
for testing), and `common.ARGUMENTS`; shots are 5 at most. Images 1..5 of the
class are the shots, 6..10 are tested.

The paper has no such experiment: settings are those of configs/kvasir.py, and
there is no published score of DistillFSS. Another method's, in episodes over
the classes for validation: IFA ResNet-50 80.1 (1 shot) and 82.4 (5 shots), a
mean over background and one class made of all, at 400x400, of a model tuned on
some of these classes and the best epoch on these episodes.
"""

from configs import common

_SHOTS = 5


def get_config(arg=None):
  """The settings of Kvasir; see the module's docstring for `arg`."""
  config, arg = common.benchmark(
    arg, 'fss1000', steps=1000, shots=_SHOTS, known={'category': str}
  )
  if arg.shots > _SHOTS:
    raise ValueError(
      f'a class of FSS-1000 has {_SHOTS} images to train, got '
      f'shots={arg.shots}: ask for fewer shots'
    )
  with config.unlocked():
    config.data.args.category = arg.category
  return common.done(config, arg)


def sweep():
  """All shots of a class, by both methods and backbones."""
  return common.grid(shots=(_SHOTS,))
