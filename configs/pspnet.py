"""PSPNet on the base classes of a fold: the base learner of BAM and HDMNet.

    python -m distillfss_jax.main --config configs/pspnet.py:data=synthetic,fold=0 --workdir runs/base

Its folder is then a --config.base.init for configs/bam.py and hdmnet.py, and a
published file of its kind a --config.model.init. Arguments after the colon:
data=pascal|coco|synthetic, fold=0|1|2|3 (whose classes are background),
backbone=resnet50|vgg16, seed=N, smoke.

The settings are BAM's: SGD, poly, 417 pixels, batch norms over a batch of 12;
on PASCAL 100 epochs, all but the backbone at ten times its rate, on COCO 20.
No score is published for it; ours was not run on either.
"""  # noqa: E501

from configs import common


def get_config(arg=None):
  """The released settings; see the module's docstring for `arg`."""
  arg = common.parse(arg, **common.FOLDS)
  config = common.dense(common.base())
  common.of_fold(config, arg, 'pspnet')
  config.dense.classes, config.dense.recipe = 'base', 'base'
  config.dense.batch_size = 12
  config.data.image_size = 417
  config.model.name = 'pspnet'
  config.optim.name, config.optim.schedule = 'sgd', 'poly'
  config.optim.nesterov, config.optim.weight_decay = False, 1e-4
  config.eval.epochs, config.eval.keep_best = 1.0, True
  config.eval.patience = 75
  config.dense.select = 'test'  # as released
  if arg.data == 'pascal':
    config.epochs, config.optim.lr = 100.0, 2.5e-4
    config.optim.groups = (('model/head/.*', 10.0, None, '', ''),)
  else:
    config.epochs, config.optim.lr = 20.0, 2.5e-3
  if arg.data == 'synthetic':
    common.embedded(config, epochs=12.0, lr=2e-2)
    config.dense.recipe = 'none'
  return common.folds_done(config, arg)
