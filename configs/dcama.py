"""DCAMA's own training on episodes of a source, as for DistillFSS's teachers.

    python -m distillfss_jax.prepare --dataset pascal --raw VOCdevkit
    python -m distillfss_jax.main --config configs/dcama.py:fold=0 --workdir runs/dcama --config.model.backbone.init=swin_b_384_microsoft

Its folder is then a --config.model.init for other configs. Arguments after the
colon: data=pascal|coco|synthetic, fold=0|1|2|3 (whose classes are tested),
shots=N, epochs=N, backbone=swin_b|resnet50, seed=N, smoke. With data=synthetic
it learns in minutes on scenes that are drawn from a seed, and needs no files:

    python -m distillfss_jax.main --config configs/dcama.py:data=synthetic,fold=0

The settings are the original's script: no support skip, the loss of the coarse
maps, SGD with Nesterov's momentum, 2 episodes a step, 50 epochs. It keeps the
epoch with the best score on the tested classes; here the last one counts. No
score is published for these settings; ours was not run to the end.
"""  # noqa: E501

from configs import common

# Pairs of an image and a class in the published lists of each fold: an epoch is
# those of the other three. For COCO about as many images as have a base class.
_PASCAL = (2286, 3425, 5883, 2086)
_COCO = 80000


def get_config(arg=None):
  """The original's settings; see the module's docstring for `arg`."""
  arg = common.parse(
    arg,
    defaults={'shots': 1, 'seed': 0, 'epochs': 50},
    data=('pascal', 'coco', 'synthetic'),
    fold=('0', '1', '2', '3'),
    shots=int,
    epochs=int,
    backbone=('swin_b', 'resnet50'),
    seed=int,
    smoke=False,
  )
  config, fold = common.get_config(), int(arg.fold)
  if arg.data == 'synthetic':
    return _embedded(config, arg)
  with config.unlocked():
    config.data.args.update(data_dir='data', fold=fold, min_area=2048)
    config.data.args.exclusive = False  # with images that show test classes
    if arg.data == 'pascal':
      config.data.args.lists = ''  # the folder of the published ones
    else:
      config.data.args.rule = 'interleaved'  # which classes are of a fold
  config.name, config.data.name = 'dcama', arg.data
  config.task, config.system = 'source', 'episodic'
  config.support.shots, config.seed = arg.shots, arg.seed
  config.model.backbone.name = arg.backbone
  config.optim.name = 'sgd'
  config.optim.lr, config.optim.weight_decay = 1e-3, 1e-4
  config.optim.trainable = ('D',)
  config.loss.scale = 'mean'
  epoch = sum(_PASCAL) - _PASCAL[fold]
  if arg.data == 'coco':
    config.source.rule = config.source.test_rule = 'random'
    epoch = _COCO
  config.steps = arg.epochs * epoch // config.source.batch_size
  config.log_every, config.checkpoint_every = 50, 1000
  config.data.workers = 4
  if arg.smoke:
    common.smoke(config)
    config.data.workers, config.source.tests = 0, 6
  return config


def _embedded(config, arg):
  """The same system on scenes, small enough for a laptop."""
  with config.unlocked():
    config.data.args.fold = int(arg.fold)
    common.embedded(config, epochs=float(min(arg.epochs, 6)), lr=1e-3)
    config.data.image_size = config.data.args.image_size = 96
  config.name, config.task, config.system = 'dcama', 'source', 'episodic'
  config.support.shots, config.seed = arg.shots, arg.seed
  config.model.backbone.name = 'resnet_tiny'
  config.optim.trainable = ('D', 'backbone')
  config.optim.schedule = 'cosine'
  config.loss.scale, config.source.batch_size = 'mean', 4
  config.source.tests, config.eval.untrained = 200, True
  config.log_every, config.checkpoint_every = 50, 400
  if arg.smoke:
    common.smoke(config)
    config.epochs, config.source.tests = 0.0, 6
  return config
