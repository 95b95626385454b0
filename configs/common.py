"""What the experiments share: every key there is, with its default."""

import itertools
import types

from ml_collections import ConfigDict


def base() -> ConfigDict:
  """What every run has, whatever it trains; not locked."""
  config = ConfigDict()
  config.name = 'common'
  config.task = 'adaptation'  # to a support set | source: of episodes | dense
  config.system = 'distillfss'  # a file of distillfss_jax/systems
  config.seed = 0  # of initial values, dropout and drawn episodes

  config.data = ConfigDict()
  config.data.name = 'synthetic'  # a file of distillfss_jax/datasets
  config.data.args = ConfigDict()  # for that file's load()
  config.data.image_size = 384
  config.data.workers = 0  # processes that decode images, at most

  config.model = ConfigDict()
  config.model.name = 'dcama'  # a file of distillfss_jax/models
  config.model.fields = ConfigDict()  # for its constructor
  config.model.init = ''  # where its weights come from; see docs/weights.md
  config.model.dont_load = ()  # regex: what of those files, or here, stays out
  config.model.dtype = 'float32'  # | bfloat16
  config.model.backbone = ConfigDict()
  config.model.backbone.name = 'resnet50'  # of the tables in backbones/
  config.model.backbone.fields = ConfigDict()  # for its constructor
  config.model.backbone.init = ''  # weights of the backbone alone

  # Durations are steps, '200', or '1.5 epochs'.
  config.optim = ConfigDict()
  config.optim.name = 'adamw'  # | sgd
  config.optim.lr = 1e-3
  config.optim.schedule = 'constant'  # | cosine | poly | stairs
  config.optim.power = 0.9  # of poly
  config.optim.stairs = ()  # of (duration, factor)
  config.optim.warmup = '0'  # duration
  config.optim.b1 = 0.9
  config.optim.b2 = 0.999
  config.optim.momentum = 0.9  # sgd's
  config.optim.nesterov = True  # sgd's
  config.optim.weight_decay = 0.01
  config.optim.clip_norm = 0.0  # of all gradients together; 0 for none
  config.optim.clip_value = 0.0  # of each entry; 0 for none
  # Rows of (regex, factor of lr, weight decay or None, begin, end): see
  # optim.build.
  config.optim.groups = ()
  config.optim.trainable = ('.*',)  # sets of the system, regex

  config.steps = 1000
  config.epochs = 0.0  # in place of steps, where it is not 0
  config.micro_batch = 0  # items at once per device; 0 chooses
  config.log_every = 10
  config.checkpoint_every = 100

  config.eval = ConfigDict()
  config.eval.every = 0  # steps between tests on the way; 0 for none
  config.eval.epochs = 0.0  # epochs between them; one of both is 0
  config.eval.keep_best = False  # conclude with the best of these, not the last
  # Such tests without a better one, of keep_best; 0 never stops.
  config.eval.patience = 0
  config.eval.batch_size = 4
  config.eval.native = True  # also score at the images' own size
  config.eval.untrained = False  # also score the initial model
  config.eval.panels = 8  # test images to show
  return config


def get_config() -> ConfigDict:
  """A complete DistillFSS config, locked: an unknown key is an error."""
  config = base()
  config.student = 'full'  # full | light | attention
  # frozen: the backbone stays in evaluation mode, and is run once per image.
  # reference: what the original's model.train() does to its frozen backbone.
  config.backbone_mode = 'frozen'

  source(config)
  config.task = 'adaptation'
  config.support.shots = 5
  # even (the reference's) | random | per_class | per_class_reference | listed
  config.support.rule = 'even'
  config.support.ids = ()  # of the listed rule, ids of training images

  config.episodes = ConfigDict()
  config.episodes.kind = 'leave_one_out'  # | paired | random
  config.episodes.subsample = 1  # shots of an episode; 0 for all others
  config.episodes.draws = 0  # episodes of a step; 0 for one per support image

  fields = config.model.fields
  fields.heads = 8
  fields.dropout = 0.5
  fields.positional = True
  fields.concat_support = False
  fields.voting = 0  # shots that answer together; 0 for all
  fields.mix_size = 0  # side of what enters the mixers; 0 for stride 4's

  config.loss = ConfigDict()
  config.loss.gamma = 2.0
  config.loss.teacher = 1 / 3  # weights of the three terms
  config.loss.student = 1 / 3
  config.loss.coarse = 1 / 3
  config.loss.logits = 0.5  # weights of the two terms of source training
  config.loss.maps = 2.0
  config.loss.detach = False  # whether coarse maps only pull the student
  config.loss.scale = 'reference'  # sum over episodes / 3 | mean

  config.optim.trainable = ('D', 'student')
  config.eval.brightness = False  # also score thresholds: fitted, and Otsu's
  config.eval.calibration = False  # also score how sure it is
  return config.lock()


def dense(config: ConfigDict) -> ConfigDict:
  """The same config with what task 'dense' reads."""
  config.task = 'dense'
  config.dense = ConfigDict()
  config.dense.batch_size = 8  # images of a step, over all processes
  config.dense.recipe = 'none'  # augmentation, see augment.py
  config.dense.held_out = 0.0  # share of training images to choose checkpoints
  # validation: those, or what the dataset keeps for it | test, as released
  config.dense.select = 'validation'
  config.dense.classes = 'all'  # | base: those that a fold does not test
  config.eval.short_side = False  # also score with the shorter side at the size
  config.eval.saliency = False  # also score soft maps, of one class
  config.eval.masks = False  # write those maps as masks/<set>/<id>.png
  return config


def segmentation(config: ConfigDict) -> ConfigDict:
  """A dense config with what system 'segmentation' reads."""
  dense(config).system = 'segmentation'
  config.loss = ConfigDict()
  config.loss.name = 'cross_entropy'  # | focal | structure, of one class
  config.loss.labels = 1.0  # weight of the labels' loss beside a teacher's
  config.loss.divided = False  # by the number of a batch's images, once more
  config.loss.weighted = False  # structure: also its cross-entropy
  config.loss.soft = False  # labels are shares, as recipe 'polyp_soft' has them
  # Of the images' side: each batch trains once at each.
  config.loss.sizes = ()
  config.teacher = ConfigDict()
  config.teacher.name = ''  # as config.model
  config.teacher.fields = ConfigDict()
  config.teacher.dtype = 'float32'
  config.teacher.backbone = ConfigDict()
  config.teacher.backbone.name = ''
  config.teacher.backbone.fields = ConfigDict()
  config.teacher.init = ''  # a run, a file, a name, or random
  config.teacher.statistics = 'running'  # | batch, of its batch norms
  config.teacher.noise = False  # whether its dropout acts
  # GB of host memory for its answers, where it says the same at each step.
  config.teacher.keep_gb = 8.0
  config.distiller = ConfigDict()
  config.distiller.name = 'none'  # a file of distillfss_jax/distillers
  config.distiller.fields = ConfigDict()  # for its constructor
  config.optim.trainable = ('student',)
  return config


# What each distiller of distillfss_jax/distillers can be told, and its default.
DISTILLERS = {
  'ad': {'weight': 1000.0},
  'aicsd': {'weight': 9500.0, 'logits': 10.0, 'released': True},
  'attnfd': {'weight': 2.0, 'norm': 'batch'},
  'cirkd': {
    'logits': 1.0, 'batch': 1.0, 'pixels': 0.1, 'regions': 0.1,
    'temperature': 0.1, 'queued_pixels': 20000, 'queued_regions': 2000,
    'drawn_pixels': 4096, 'drawn_regions': 1024, 'released': True,
  },
  'dist': {'weight': 1.0, 'between': 1.0, 'within': 1.0, 'temperature': 1.0},
  'ickd': {'weight': 1.0},
  'kd': {'weight': 1.0, 'temperature': 1.0, 'mean': 'pixels'},
  'kdas': {
    'weight': 0.3, 'temperature': 2.0, 'mode': 'released', 'guide': 'mse',
  },
  'lad': {'weight': 1.0},
  'overhaul': {'weight': 1e-5},
  'sp': {'weight': 10.0, 'part': 0.5},
}  # fmt: skip


def distiller(config: ConfigDict, name: str) -> None:
  """Sets a distiller with all that flags can change of it."""
  config.distiller.name = name
  config.distiller.fields = ConfigDict(DISTILLERS[name])


def deeplab(model: ConfigDict, backbone: str, *, attention: str) -> None:
  """Sets DeepLabv3+ at output stride 16, as AttnFD has it."""
  model.name = 'deeplab'
  model.fields = ConfigDict()
  model.fields.width = 256  # of the pooled and of the decoded maps
  model.fields.dropout = (0.5, 0.5, 0.1)  # after ASPP, and in the decoder
  model.fields.attention = attention  # none | learned | free
  model.backbone.name = backbone
  model.backbone.fields = ConfigDict({'output_stride': 16})
  if backbone == 'resnet101':
    model.backbone.fields.multi_grid = (1, 2, 4)
  elif backbone == 'lite0' and 'init' in model.backbone:
    model.backbone.init = 'lite0'  # which pip has brought


def _chosen(config: ConfigDict, arg: types.SimpleNamespace) -> None:
  """Sets what checkpoints are chosen on, after every epoch."""
  # Parity: select=test is what the originals do.
  config.eval.epochs, config.eval.keep_best = 1.0, True
  config.dense.select = arg.select
  if arg.select == 'validation' and arg.data != 'camvid':  # which keeps some
    config.dense.held_out = 0.1


def small_deeplab(model: ConfigDict, backbone: str) -> None:
  """The same for scenes drawn from a seed, in minutes."""
  small = {'resnet101': 'resnet_small', 'resnet18': 'resnet_tiny'}
  model.backbone.name = small.get(backbone, backbone)
  model.backbone.fields = ConfigDict({'output_stride': 16})
  model.fields.width = 64


DENSE = {
  'data': ('pascal', 'cityscapes', 'camvid', 'synthetic'),
  'train': ('voc', 'aug'),
  'select': ('validation', 'test'),
  'seed': int,
  'smoke': False,
}


def of_streets(
  config: ConfigDict, arg: types.SimpleNamespace, *, begin: str = ''
) -> None:
  """Data and optimiser of AttnFD: SGD, poly, all but the backbone at 10x.

  Args:
    config: of `segmentation`, to be changed.
    arg: as `DENSE` has it.
    begin: when the student begins to learn, a duration.
  """
  config.seed, config.data.name = arg.seed, arg.data
  config.data.args.data_dir, config.data.workers = 'data', 4
  config.data.image_size = 513
  config.dense.batch_size = 6
  if arg.data == 'pascal':
    # Whether the published students saw SBD's labels is not known; the numbers
    # fit without (1464 images), and the teacher's with them (10582).
    config.data.args.augmented = arg.train == 'aug'
  elif arg.data == 'camvid':
    config.data.args.update(train='train', test='test')
  # Parity: what pads a small image is background for VOC.
  config.dense.recipe = (
    'attnfd' if arg.data == 'pascal' else 'attnfd_cityscapes'
  )
  optim = config.optim
  optim.name, optim.schedule, optim.weight_decay = 'sgd', 'poly', 5e-4
  optim.lr = 0.01 if arg.data == 'cityscapes' else 0.007
  config.epochs = 200.0 if arg.data == 'cityscapes' else 120.0
  optim.groups = (
    ('model/(backbone|attention/stage4)/.*', 1.0, None, begin, ''),
    ('model/.*', 10.0, None, begin, ''),
  )
  config.loss.divided = True
  config.eval.short_side, config.eval.native = True, True
  _chosen(config, arg)
  if arg.data == 'synthetic':
    config.data.name, config.data.workers = 'scenes', 0
    config.data.args = ConfigDict()
    config.data.args.update(num_train=400, num_test=100, image_size=96)
    config.data.args.classes = SCENES
    config.data.image_size, config.dense.batch_size = 96, 8
    config.dense.recipe, config.eval.batch_size = 'none', 10
    config.eval.short_side, config.eval.native = False, False
    config.eval.epochs, optim.lr = 4.0, 0.1


def undivided(config: ConfigDict, arg: types.SimpleNamespace) -> None:
  """Cross-entropy as it is, not divided by the batch once more.

  The rate on scenes was chosen for the divided one, and is brought in line;
  that of VOC, 0.007, is usual without it.
  """
  config.loss.divided, config.dense.recipe = False, 'attnfd_void'
  if arg.data == 'synthetic':
    config.dense.recipe = 'none'
    config.optim.lr /= config.dense.batch_size


# Classes of the embedded scenes that minutes are enough for.
SCENES = ('striped disc', 'checked ring', 'dotted star', 'patched cross')


POLYPS = {
  'data': ('polyp', 'kvasir', 'synthetic'),
  'select': ('validation', 'test'),
  'augmented': False,
  'seed': int,
  'smoke': False,
}


def of_polyps(config: ConfigDict, arg: types.SimpleNamespace) -> None:
  """Data and optimiser of Polyp-PVT and KDAS: AdamW at a constant rate."""
  config.seed, config.data.name = arg.seed, arg.data
  config.data.args.data_dir, config.data.workers = 'data', 4
  config.data.image_size, config.dense.batch_size = 352, 16
  config.dense.recipe = (
    'polyp_soft_augmented' if arg.augmented else 'polyp_soft'
  )
  config.loss.name, config.loss.soft = 'structure', True
  config.loss.sizes = (0.75, 1.0, 1.25)
  config.optim.lr = config.optim.weight_decay = 1e-4
  config.optim.clip_value = 0.5
  config.epochs = 99.0  # Parity: the original's 100 begin at 1
  config.eval.saliency, config.eval.native = True, False
  _chosen(config, arg)
  if arg.data == 'synthetic':
    config.data.name, config.data.workers = 'scenes', 0
    config.data.args = ConfigDict({'kind': 'blobs'})
    config.data.args.update(num_train=256, num_test=64, image_size=96)
    config.data.image_size, config.dense.batch_size = 96, 8
    config.eval.batch_size, config.eval.epochs = 8, 5.0


def polyp_pvt(model: ConfigDict, backbone: str) -> None:
  """Sets Polyp-PVT over b0 to b5 of PVTv2; or lite0, which pip brings."""
  model.name = 'polyp_pvt'
  model.backbone.name = f'pvt_v2_{backbone}'
  if backbone == 'lite0':
    model.backbone.name = 'lite0'
    if 'init' in model.backbone:
      model.backbone.init = 'lite0'


def dense_done(config: ConfigDict, arg: types.SimpleNamespace) -> ConfigDict:
  """The config, locked, and made small if the arguments ask for it."""
  if arg.smoke:
    smoke(config)
    config.data.workers, config.epochs, config.eval.epochs = 0, 0.0, 0.0
    config.eval.keep_best = False
    config.dense.batch_size, config.model.backbone.init = 2, ''
    if config.teacher.name:
      config.teacher.init = config.teacher.init or 'random'
      config.teacher.backbone.name = config.model.backbone.name
      config.teacher.backbone.fields = config.model.backbone.fields
    for group in (config.model, config.teacher):
      if 'multi_grid' in group.backbone.fields:
        del group.backbone.fields['multi_grid']
  return config.lock()


def source(config: ConfigDict) -> ConfigDict:
  """The same config with what task 'source' reads."""
  config.task = 'source'
  config.support = ConfigDict()
  config.support.shots = 1  # of an episode
  config.support.seed = 0  # of shots that are drawn once
  config.source = ConfigDict()
  # How episodes are found: pair | image | class | random, or with a query that
  # is one of the shots: shot | shot_of_pair.
  config.source.rule = 'pair'
  config.source.pairs = 0  # of shot_of_pair, how many it takes; 0 for all
  config.source.parts = ('train', 'test')  # of the data
  config.source.test_data = ''  # a dataset that is tested in place of data.name
  # apart: of other classes | released: adapts on what is tested | fixed: each
  # class has the same shots always, which are not tested.
  config.source.protocol = 'apart'
  config.source.recipe = 'none'  # augmentation of the query, see augment.py
  config.source.support_recipe = 'none'
  config.source.batch_size = 2  # episodes of a step, over all processes
  config.source.tests = 1000  # episodes to test on
  config.source.test_rule = 'pair'
  config.source.test_seed = 0  # of the episodes that checkpoints are chosen by
  # Of the last test, with mean and deviation; of none, it is test_seed's.
  config.source.test_seeds = ()
  config.source.test_recipe = 'none'  # | stretch | fit: how images are resized
  config.source.test_exact = False  # undone exactly; else as the originals do
  config.source.metric = 'class_miou'  # | fb_iou | reference_batch: what counts
  config.source.reference_batch = 0  # also as IFA's code counts so many at once
  config.source.reference_classes = 0  # of its matrix; 0 for as many as tested
  config.source.chosen_by = 'test'  # | leave_one_out: among the shots
  config.source.generalised = 0  # episodes of any query, beside base classes
  config.source.prior = False  # also score BAM's prior mask, without learning
  return config


RECIPES = ('paper', 'ours', 'unet')
# Methods that are tested as they are: nothing adapts. For each its model, its
# backbone, the side of its images, and what trains where something does.
BASELINES = {
  'bam': ('bam', 'resnet50_deep', 641, 'meta'),
  'hdmnet': ('hdmnet', 'resnet50_deep', 641, 'meta'),
  'ifa': ('ssp', 'resnet50_ssp', 400, 'convolutions'),
}
ANY_SHOTS = ('ifa',)  # of these, whose models take any number at once

ARGUMENTS = {
  'method': ('distill', 'transfer', *BASELINES),
  'teacher': ('dcama', *BASELINES),  # of distill and transfer
  'shots': int,
  'backbone': ('swin_b', 'resnet50'),
  'student': ('full', 'light', 'attention'),
  'model_shots': ('1', '5'),  # that the model of bam or hdmnet takes at once
  'seed': int,
  'unlabelled': str,  # train, or a folder of images: of our recipes
  'smoke': False,
}


def benchmark(
  arg: str | None,
  name: str,
  *,
  steps: int,
  transfer_steps: int | None = None,
  shots: int = 5,
  subsample: int = 1,
  kind: str = 'leave_one_out',
  rule: str = 'even',
  recipes: tuple[str, ...] = RECIPES,
  known: dict | None = None,
) -> tuple[ConfigDict, types.SimpleNamespace]:
  """A dataset of the paper's benchmark, with what its experiments share.

  Args:
    arg: what follows the colon: see `ARGUMENTS`; and data=synthetic.
    name: of the experiment and of the dataset's file.
    steps: of DistillFSS. transfer_steps: of TransferFSS; None for the same.
    shots: where `arg` says nothing.
    subsample, kind: of the episodes. rule: of the support.
    recipes: `RECIPES`, the default first.
    known: more arguments, as `parse` takes them.

  Returns:
    The config, and the arguments it was made from; finish with `done`.
  """
  text = arg or ''
  arg = parse(
    arg,
    defaults={'shots': shots, 'seed': 0},
    data=(name, 'synthetic'),
    **ARGUMENTS,
    recipe=recipes,
    **(known or {}),
  )
  config = get_config()
  with config.unlocked():
    config.data.args.data_dir = 'data'
  config.name = config.data.name = name
  config.support.shots, config.support.rule = arg.shots, rule
  config.episodes.kind, config.episodes.subsample = kind, subsample
  config.model.backbone.name = arg.backbone
  config.student, config.seed = arg.student, arg.seed
  config.steps = steps
  given = {item.partition('=')[0] for item in text.split(',')}
  if arg.recipe != 'paper':
    of_paper = {'backbone', 'method', 'model_shots', 'student', 'teacher'}
    if left := sorted(given & of_paper):
      raise ValueError(
        f'{", ".join(left)} belong to recipe=paper; recipe={arg.recipe} has a '
        'model of its own'
      )
    few_views(
      config,
      look='auto' if arg.recipe == 'ours' else 'recolour',
      unlabelled=arg.unlabelled,
    )
    if arg.recipe == 'unet':
      config.optim.trainable = ('.*',)
      config.optim.groups = ((r'model/backbone/.*', 0.25, None, '', ''),)
    return config, arg
  if arg.unlabelled:
    raise ValueError(
      f'unlabelled={arg.unlabelled} belongs to recipe=ours and recipe=unet; '
      f'recipe=paper learns from annotated images alone'
    )
  if 'model_shots' in given and {arg.method, arg.teacher} & set(ANY_SHOTS):
    raise ValueError(
      f'model_shots={arg.model_shots} is of bam and hdmnet; the model of '
      f'{", ".join(ANY_SHOTS)} takes all shots at once'
    )
  if arg.method == 'transfer':
    config.system = 'transferfss'
    config.steps = transfer_steps or steps
    config.model.fields.voting = 10
    config.optim.trainable = ('D',)
  elif arg.method in BASELINES:
    if arg.teacher != 'dcama':
      raise ValueError(
        f'method={arg.method} tests a published model as it is; teacher='
        f'{arg.teacher} belongs to method=distill and method=transfer'
      )
    baseline(config, arg.method, int(arg.model_shots))
  if arg.teacher != 'dcama':
    taught(config, arg.teacher, int(arg.model_shots))
    if 'student' not in given:
      config.student = 'light'  # the full one has 38 M parameters per class
  return config, arg


def few_views(config: ConfigDict, *, look: str, unlabelled: str = '') -> None:
  """Our recipe for few images: a U-Net on a pretrained backbone, by views.

  Its constants were set once, and none was chosen on a test set;
  docs/five-images.md says how it compares.
  """
  with config.unlocked():
    for group in ('episodes', 'loss', 'student', 'backbone_mode'):
      del config[group]
    config.system, config.model.name = 'finetune', 'unet'
    config.model.fields = ConfigDict()
    config.model.backbone.name = config.model.backbone.init = 'lite0'
    config.model.backbone.fields.finest = 2
    config.episodes = ConfigDict()
    config.episodes.kind = 'views'
    config.episodes.draws = 8  # views of a step
    config.episodes.subsample = 0
    config.views = ConfigDict()
    # colour | recolour | polarity: see LOOKS in systems/finetune.py; auto: the
    # best on held-out annotated images.
    config.views.look = look
    # What logits are divided by; 0: what held-out annotated images ask for.
    config.views.temperature = 0.0 if look == 'auto' else 1.0
    config.views.size = 128  # of a view, in pixels
    config.views.sides = (96.0, 384.0)  # of a whole image in a view
    # More images, which nobody annotated: train, the other training images, or
    # a folder of them. Half of the views are theirs.
    config.support.unlabelled = unlabelled
  # Of up to twenty images each is seen as often as each of five in 300 steps.
  config.steps = 60 * min(max(config.support.shots, 5), 20)
  config.steps *= 2 if unlabelled else 1
  config.log_every, config.checkpoint_every = 50, 100
  config.optim.lr, config.optim.trainable = 2e-3, ('decoder',)
  config.optim.schedule, config.optim.warmup = 'cosine', '20'
  config.eval.batch_size = 8
  config.eval.brightness = config.eval.calibration = True


def baseline(config: ConfigDict, name: str, shots: int) -> None:
  """Sets a method of another paper, as trained on its source, and no training.

  Whatever `support.shots` is, its model takes `shots` at once, if not any: they
  are answered in rounds, the last of which repeats its last shot, and the
  largest answer of all rounds counts. With steps it is TransferFSS of that
  method.

  Args:
    config: to be changed.
    name: of `BASELINES`.
    shots: of the model.
  """
  config.system, config.steps = 'transferfss', 0
  config.model.name, backbone, side, trains = BASELINES[name]
  fields = {'shot_major': False}
  if name not in ANY_SHOTS:
    fields = {'classes': 61, 'shots': shots, 'head_dropout': 0.1}
  if name == 'hdmnet':
    fields['restored'] = False
  with config.unlocked():
    config.model.fields = ConfigDict(fields)
  config.model.backbone.name, config.data.image_size = backbone, side
  config.optim.trainable = (trains,)


def taught(config: ConfigDict, name: str, shots: int) -> None:
  """Sets another teacher for TransferFSS or DistillFSS, and what it trains.

  Args:
    config: of `benchmark`, to be changed.
    name: of `BASELINES`.
    shots: of the model, and of an episode at most.
  """
  system, steps = config.system, config.steps
  baseline(config, name, shots)
  config.system, config.steps = system, steps
  if name == 'hdmnet':
    config.optim.lr = 1e-4  # its own; at 1e-3 its transformer unlearns all
  if name not in ANY_SHOTS:
    config.episodes.subsample = min(config.episodes.subsample or shots, shots)
  if system == 'distillfss':
    config.optim.trainable = (*config.optim.trainable, 'student')


FOLDS = {
  'data': ('pascal', 'coco', 'synthetic'),
  'fold': ('0', '1', '2', '3'),
  'backbone': ('resnet50', 'vgg16'),
  'seed': int,
  'smoke': False,
}


def of_fold(config: ConfigDict, arg: types.SimpleNamespace, name: str) -> None:
  """Sets the data and the backbone of BAM's family, from `FOLDS`."""
  config.name = config.system = name
  config.seed = arg.seed
  config.data.name, config.data.workers = arg.data, 4
  config.data.args.update(data_dir='data', fold=int(arg.fold), min_area=2048)
  # Parity: images that also show tested classes are left out of training.
  config.data.args.exclusive = name != 'pspnet'
  config.model.backbone.name = (
    'resnet50_deep' if arg.backbone == 'resnet50' else arg.backbone
  )
  # The base learner's validation is at the model's size, episodes are not.
  config.eval.native = name != 'pspnet'
  config.base = ConfigDict()
  if arg.data == 'pascal':
    config.data.args.lists = ''  # the folder of the published ones
  elif arg.data == 'coco':
    config.data.args.rule = 'interleaved'  # which classes are of a fold


def embedded(config: ConfigDict, *, epochs: float, lr: float) -> None:
  """The same in minutes, on scenes that are drawn from a seed."""
  fold = config.data.args.fold
  config.data.name, config.data.workers = 'scenes', 0
  config.data.args = ConfigDict()
  config.data.args.update(fold=fold, image_size=97, num_train=800, num_test=200)
  config.data.image_size = 97
  config.model.backbone.name = SMALL.get(
    config.model.backbone.name, 'resnet_tiny_deep'
  )
  config.epochs, config.optim.lr = epochs, lr
  config.eval.batch_size = 8


def folds_done(config: ConfigDict, arg: types.SimpleNamespace) -> ConfigDict:
  """The config, locked, and made small if the arguments ask for it."""
  if arg.smoke:
    smoke(config)
    config.data.workers, config.epochs, config.eval.epochs = 0, 0.0, 0.0
    config.eval.keep_best, config.eval.patience = False, 0
    if 'source' in config:
      config.source.batch_size, config.source.tests = 2, 6
      config.source.test_seeds = config.source.test_seeds[:2]
      config.source.generalised = min(config.source.generalised, 4)
    else:
      config.dense.batch_size = 2
  return config.lock()


def done(config: ConfigDict, arg: types.SimpleNamespace) -> ConfigDict:
  """The config, on drawn images and made small if the arguments ask for it."""
  if arg.data == 'synthetic':
    drawn(config)
  return smoke(config) if arg.smoke else config


def drawn(config: ConfigDict) -> None:
  """The same on nuclei drawn from a seed, which needs no files."""
  config.data.name, config.data.image_size = 'synthetic', 96
  with config.unlocked():
    config.data.args = ConfigDict()
    train = max(64, config.support.shots)
    config.data.args.update(num_train=train, num_test=32, image_size=96)
    config.data.args.update(classes=1, seed=0, zoom=2.0, light='transmission')
  if 'views' not in config:
    # A small backbone without weights has to learn, too.
    config.model.backbone.name = SMALL.get(
      config.model.backbone.name, 'resnet_tiny'
    )
    config.optim.trainable = (*config.optim.trainable, 'backbone')


SMALL = {
  'resnet50_deep': 'resnet_tiny_deep',
  'resnet50_ssp': 'resnet_tiny_ssp',
  'resnet101_ssp': 'resnet_tiny_ssp',
  'vgg16': 'vgg_tiny',
  **dict.fromkeys(('pvt_v2_b0', 'pvt_v2_b2'), 'pvt_v2_tiny'),
}


def grid(shots: tuple[int, ...], **more: tuple):
  """The runs behind a row of the paper's tables."""
  for values in itertools.product(
    ('distill', 'transfer'), shots, ('swin_b', 'resnet50'), *more.values()
  ):
    yield dict(zip(('method', 'shots', 'backbone', *more), values, strict=True))


def smoke(config: ConfigDict) -> ConfigDict:
  """The same experiment in a minute: tiny images, backbone and step count."""
  config.data.image_size = 64
  name = config.model.backbone.name
  if name not in SMALL.values():
    config.model.backbone.name = SMALL.get(name, 'resnet_tiny')
    config.model.backbone.init = ''
  if 'views' in config:
    config.model.backbone.fields = ConfigDict()
    config.views.update(look='polarity', size=32, sides=(32.0, 96.0))
  config.steps, config.epochs = min(config.steps, 4), 0.0
  config.log_every = 2
  config.checkpoint_every = 2
  config.eval.panels = 2
  if config.data.name == 'synthetic':
    config.data.args.update(num_test=4, image_size=64)
  return config


def parse(arg: str | None, *, defaults: dict | None = None, **known):
  """Reads what follows the colon of --config: 'shots=10,smoke'.

  Args:
    arg: the text, or None.
    defaults: of the numbers.
    **known: for each name, the values it may have (the first is the default),
      `int`, `str`, or False for a flag.

  Raises:
    ValueError: a name or value that is not known; says what is.
  """
  defaults = defaults or {}
  first = {int: 0, str: '', False: False}
  values = {
    name: kind[0]
    if isinstance(kind, tuple)
    else defaults.get(name, first[kind])
    for name, kind in known.items()
  }
  for item in filter(None, (arg or '').split(',')):
    name, _, text = item.partition('=')
    if name not in known:
      raise ValueError(
        f'no config argument {name!r}; there are: {", ".join(known)}'
      )
    kind = known[name]
    if kind is False:
      if text not in ('', 'True', 'False'):
        raise ValueError(f'{name} is a flag, without a value; got {text!r}')
      values[name] = text != 'False'
    elif kind is int:
      if not text.isdecimal():
        raise ValueError(f'{name} needs a whole number, got {text!r}')
      values[name] = int(text)
    elif kind is str or text in kind:
      values[name] = text
    else:
      raise ValueError(
        f'{name}={text!r} is not known; there are: {", ".join(kind)}'
      )
  return types.SimpleNamespace(**values)
