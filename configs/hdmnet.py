"""HDMNet on episodes of a source: hierarchical matching (2303.14652).

    python -m distillfss_jax.main --config configs/pspnet.py:data=synthetic,fold=0 --workdir runs/base
    python -m distillfss_jax.main --config configs/hdmnet.py:data=synthetic,fold=0 --config.base.init=runs/base

Arguments after the colon: data=pascal|coco|synthetic, fold=0|1|2|3 (whose
classes are tested), shots=1|5, backbone=resnet50|vgg16, seed=N, smoke.
`base.init` is a run of configs/pspnet.py of the same data, fold and backbone,
or a published file of its kind; `model.init` a published file of the whole.

The settings are the released ones: AdamW at 1e-4, what is not the matcher at ten
times that, poly, 200 epochs on PASCAL (473 pixels) and 50 on COCO (633), the
checkpoint that is best on the tested classes; the test is the mean over ten
seeds of 1000 episodes. Published mean mIoU over the folds of PASCAL, ResNet-50,
1 and 5 shots: 69.4, 71.8; ours was not run there.
"""  # noqa: E501

from configs import common

CLASSES = {'pascal': 15, 'coco': 60, 'synthetic': 9}  # of a base learner


def get_config(arg=None):
  """The released settings; see the module's docstring for `arg`."""
  arg = common.parse(arg, defaults={'shots': 1}, shots=int, **common.FOLDS)
  config = common.source(common.base())
  common.of_fold(config, arg, 'hdmnet')
  config.base.init = ''  # the base learner: a run's folder or a file
  config.model.name = 'hdmnet'
  config.model.fields.classes = 1 + CLASSES[arg.data]
  config.model.fields.shots = config.support.shots = arg.shots
  config.model.fields.head_dropout = 0.1  # acts in the frozen base learner
  config.model.fields.restored = False  # the shots' weights in their order
  config.source.rule = config.source.test_rule = 'image'
  config.source.batch_size, config.source.test_seed = 8, 321
  config.source.test_seeds = (510, 365, 382, 322, 988, 98, 742, 17, 595, 106)
  config.source.test_recipe = 'stretch'
  config.optim.schedule, config.optim.lr = 'poly', 1e-4
  # Parity: with several shots, the weights of shots are not trained.
  config.optim.trainable = ('meta_without_shots',)
  config.optim.groups = (
    (
      'model/(query_neck|support_neck|support_merge|query_merge|ensemble)/.*',
      10.0,
      None,
      '',
      '',
    ),
  )
  large = arg.data == 'coco'
  config.data.image_size = 633 if large else 473
  config.source.recipe = config.source.support_recipe = (
    'hdmnet_coco' if large else 'hdmnet'
  )
  config.epochs = 50.0 if large else 200.0
  config.eval.epochs, config.eval.keep_best = 1.0, True
  config.eval.patience = 75
  if arg.data == 'synthetic':
    common.embedded(config, epochs=4.0, lr=1e-3)
    config.source.recipe = config.source.support_recipe = 'none'
    config.source.tests, config.source.test_seeds = 200, ()
    config.source.prior = True
  return common.folds_done(config, arg)
