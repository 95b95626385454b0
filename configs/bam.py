"""BAM on episodes of a source: what not to segment (2203.07615).

    python -m distillfss_jax.main --config configs/pspnet.py:data=synthetic,fold=0 --workdir runs/base
    python -m distillfss_jax.main --config configs/bam.py:data=synthetic,fold=0 --config.base.init=runs/base

Arguments after the colon: data=pascal|coco|synthetic, fold=0|1|2|3 (whose
classes are tested), shots=1|5, backbone=resnet50|vgg16, seed=N, smoke.
`base.init` is a run of configs/pspnet.py of the same data, fold and backbone,
or a published file of its kind; `model.init` a published file of the whole.

The settings are the released ones: SGD at 0.05, poly, 8 episodes a step, 200
epochs on PASCAL (473 pixels) and 50 on COCO (641), the checkpoint that is best
on the tested classes; the test is the mean over five seeds of 1000 episodes.
Published mean mIoU over the folds of PASCAL, ResNet-50, 1 and 5 shots: 67.8,
70.9; ours was not run there.
"""  # noqa: E501

from configs import common

CLASSES = {'pascal': 15, 'coco': 60, 'synthetic': 9}  # of a base learner


def get_config(arg=None):
  """The released settings; see the module's docstring for `arg`."""
  arg = common.parse(arg, defaults={'shots': 1}, shots=int, **common.FOLDS)
  config = common.source(common.base())
  common.of_fold(config, arg, 'bam')
  config.base.init = ''  # the base learner: a run's folder or a file
  config.model.name = 'bam'
  config.model.fields.classes = 1 + CLASSES[arg.data]
  config.model.fields.shots = config.support.shots = arg.shots
  config.model.fields.head_dropout = 0.1  # acts in the frozen base learner
  config.source.rule = config.source.test_rule = 'image'
  config.source.batch_size, config.source.test_seed = 8, 321
  config.source.test_seeds = (510, 365, 382, 322, 988)
  config.source.test_recipe = 'fit'
  config.optim.name, config.optim.schedule = 'sgd', 'poly'
  config.optim.lr, config.optim.weight_decay = 5e-2, 1e-4
  config.optim.nesterov, config.optim.trainable = False, ('meta',)
  large = arg.data == 'coco'
  config.data.image_size = 641 if large else 473
  config.source.recipe = config.source.support_recipe = (
    'bam_coco' if large else 'bam'
  )
  config.epochs = 50.0 if large else 200.0
  config.eval.epochs, config.eval.keep_best = 1.0, True
  config.eval.patience = 75
  if arg.data == 'synthetic':
    common.embedded(config, epochs=4.0, lr=2e-2)
    config.source.recipe = config.source.support_recipe = 'none'
    config.source.tests, config.source.test_seeds = 200, ()
    config.source.prior = True
  return common.folds_done(config, arg)
