"""What a run can be told: each setting once, with its type, default and meaning.

The defaults are the released recipe (DeiT's, as PVT and Twins use it). The line under each field
is what ``--help`` shows. Settings are grouped here and flat everywhere else: on the command line,
in configuration files, in a run's ``config.yaml`` and in its checkpoints.
"""

from __future__ import annotations

import ast
import math
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field, fields, replace
from functools import cache
from itertools import pairwise
from typing import Any, Literal, get_type_hints

from ecoformer.config.types import fits, spell
from ecoformer.errors import InputError, suggest
from ecoformer.hash_config import HashConfig

# Keywords of models -> what decides them.
_SET_ELSEWHERE = {
    "attention": "--attn_type does",
    "checkpoint_path": "--finetune does",
    "drop_path_rate": "--drop-path does",
    "hashing": "the flags of hash functions do",
    "img_size": "--input-size does",
    "in_chans": "the data do",
    "max_tokens": "--max-tokens does",
    "num_classes": "the data do",
    "num_words": "the data do",
    "pretrained": "--finetune does",
    "proj_drop_rate": "--drop does",
}


@dataclass(frozen=True)
class ModelConfig:
    """The network."""

    model: str = ""
    """Backbone variant or released model name."""
    attn_type: str | None = None
    """Attention kind; None: what the model's name says, else the variant's first."""
    drop: float = 0.0
    """Dropout rate."""
    drop_path: float = 0.1
    """Drop path rate of the last block; earlier ones rise linearly to it."""
    input_size: int = 224
    """Image side, pixels."""
    max_tokens: int = 2000
    """Positions of a sequence encoder; the longest sequences of LISTOPS."""
    model_kwargs: tuple[str, ...] = ()
    """Further keywords of the model, as key=value; as timm's scripts take them."""
    train_msa: bool = False
    """Fine-tune original Twins weights into softmax attention."""

    def __post_init__(self) -> None:
        _require(self, lambda x: 0 <= x < 1, "in [0, 1)", "drop", "drop_path")
        _require(self, lambda x: x >= 32, "at least 32 pixels", "input_size")
        _require(self, lambda x: 20 <= x <= 2**20, "from 20 to 2^20 tokens", "max_tokens")
        for name in self.keywords:
            if name in _SET_ELSEWHERE:
                raise InputError(f"model_kwargs sets {name}, which {_SET_ELSEWHERE[name]}.")

    @property
    def keywords(self) -> dict[str, Any]:
        """``model_kwargs`` by name, numbers and other literals as such."""
        found: dict[str, Any] = {}
        for word in self.model_kwargs:
            name, equals, value = word.partition("=")
            if not (name.isidentifier() and equals) or name in found:
                raise InputError(
                    f"model_kwargs has {word!r}; expected key=value, each key once, as depth=6."
                )
            found[name] = value
            with suppress(ValueError, SyntaxError):
                found[name] = ast.literal_eval(value)
        return found


@dataclass(frozen=True)
class DataConfig:
    """Images and how they are loaded."""

    data_path: str | None = None
    """Data folder; with train/ and val/ for IMNET. DIGITS, PAIRS and SCENES need none."""
    data_set: Literal[
        "IMNET",
        "CIFAR",
        "FMNIST",
        "DIGITS",
        "PAIRS",
        "INAT",
        "INAT19",
        "IMNET100",
        "LISTOPS",
        "PATHFINDER",
        "PIXELS",
        "SCENES",
        "COCO",
        "ADE20K",
    ] = "IMNET"
    """IMNET is any folder of class folders; PAIRS and SCENES are drawn, of digits or FMNIST."""
    short_side: int = 800
    """Short side of an image to detect in, side of a crop to segment or of a SCENE; pixels."""
    long_side: int = 1333
    """Largest long side of images to detect in, pixels."""
    batch_size: int = 32
    """Images a process takes a step."""
    num_workers: int = 10
    """Loader processes a rank, at most one a core."""
    pin_mem: bool = True
    """Page-lock batches, which speeds up their way to a GPU."""
    epoch_samples: int | None = None
    """Training samples of an epoch, drawn anew each time; None: all."""
    eval_samples: int | None = None
    """Held-out samples to evaluate on, the same ones in every run; None: all."""
    eval_split: Literal["val", "test"] = "val"
    """Split that --eval measures; LISTOPS and PATHFINDER have a test split, for the end."""
    repeated_aug: bool = True
    """An epoch is a third of the training images, three times each, augmented differently."""
    max_bad_images: int = 0
    """Unreadable training images that a rank skips before the run stops."""

    def __post_init__(self) -> None:
        _require(
            self, lambda x: x >= 1, "at least 1", "batch_size", "epoch_samples", "eval_samples"
        )
        _require(self, lambda x: x >= 0, "at least 0", "num_workers", "max_bad_images")
        _require(self, lambda x: x >= 32, "at least 32 pixels", "short_side")


@dataclass(frozen=True)
class AugmentConfig:
    """What is done to training images and labels."""

    scale: tuple[float, float] = (0.08, 1.0)
    """Smallest and largest share of an image's area that a training crop shows."""
    hflip: float = 0.5
    """Probability of a horizontal flip."""
    color_jitter: float = 0.4
    """Colour jitter factor; a policy of --aa replaces it."""
    aa: str | None = "rand-m9-mstd0.5-inc1"
    """AutoAugment or RandAugment policy in timm's notation; none: off."""
    smoothing: float = 0.1
    """Label smoothing."""
    train_interpolation: Literal["bicubic", "bilinear", "random"] = "bicubic"
    """Resampling of training images."""
    tensor_resize: bool = False
    """Resize training images as tensors, nearly as Pillow does, which loads them faster."""
    reprob: float = 0.25
    """Probability of random erasing."""
    remode: Literal["pixel", "rand", "const"] = "pixel"
    """Fill of erased areas: noise, one random colour, or the mean colour."""
    recount: int = 1
    """Areas erased at most."""
    mixup: float = 0.8
    """Mixup alpha; 0: off."""
    cutmix: float = 1.0
    """CutMix alpha; 0: off."""
    cutmix_minmax: tuple[float, float] | None = None
    """Smallest and largest share of the side that CutMix pastes; turns CutMix on."""
    mixup_prob: float = 1.0
    """Probability that a batch is mixed at all."""
    mixup_switch_prob: float = 0.5
    """Probability of CutMix where both could be used."""
    mixup_mode: Literal["batch", "pair", "elem"] = "batch"
    """Draw the mixing ratio for a batch, a pair or each image."""

    def __post_init__(self) -> None:
        _require(self, lambda x: 0 <= x < 1, "in [0, 1)", "smoothing")
        _require(self, lambda x: 0 <= x < math.inf, "at least 0", "color_jitter", "mixup", "cutmix")
        _require(
            self,
            lambda x: 0 <= x <= 1,
            "in [0, 1]",
            *("hflip", "reprob", "mixup_prob", "mixup_switch_prob"),
        )
        _require(self, lambda x: 0 < x[0] <= x[1] <= 1, "two rising shares in (0, 1]", "scale")
        _require(self, lambda x: x >= 1, "at least 1", "recount")
        _require(
            self, lambda x: 0 <= x[0] < x[1] <= 1, "two rising shares in [0, 1]", "cutmix_minmax"
        )


@dataclass(frozen=True)
class OptimConfig:
    """Optimiser and schedule."""

    opt: str = "adamw"
    """Optimiser, by timm's name."""
    opt_eps: float = 1e-8
    """Epsilon of the optimiser."""
    opt_betas: tuple[float, float] | None = None
    """Betas of the optimiser; None: its own."""
    momentum: float = 0.9
    """Momentum of SGD."""
    weight_decay: float = 0.05
    """Weight decay; biases and vectors have none."""
    clip_grad: float | None = None
    """Largest L2 norm of the gradient; none: not clipped."""
    lr: float = 5e-4
    """Peak learning rate for 512 images a step; scaled to the real number."""
    sched: Literal["cosine", "tanh", "step", "multistep", "plateau", "poly"] = "cosine"
    """Learning rate schedule."""
    warmup_lr: float = 1e-6
    """Learning rate that warm-up starts from; not scaled."""
    min_lr: float = 1e-5
    """Learning rate that the schedule ends at; not scaled."""
    warmup_epochs: int = 5
    """Epochs of warm-up, part of --epochs."""
    decay_epochs: float = 30.0
    """Epochs between the drops of the step schedule."""
    decay_milestones: tuple[int, ...] = ()
    """Epochs after which the multistep schedule drops."""
    decay_rate: float = 0.1
    """Factor of a drop; the power of poly."""
    patience_epochs: int = 10
    """Epochs without progress before the plateau schedule drops."""
    lr_noise: tuple[float, ...] | None = None
    """Share of the epochs at which noise on the rate starts, and ends."""
    lr_noise_pct: float = 0.67
    """Limit of the noise, share of the rate."""
    lr_noise_std: float = 1.0
    """Standard deviation of the noise."""
    epochs: int = 300
    """Epochs to train."""
    grad_accum_steps: int = 1
    """Batches whose gradients make one step."""
    refit_every_epochs: int = 300
    """Epochs from one fit of the hash functions to the next."""

    def __post_init__(self) -> None:
        _require(
            self,
            lambda x: 0 <= x < math.inf,
            "at least 0",
            *("opt_eps", "weight_decay", "lr", "warmup_lr", "min_lr", "warmup_epochs"),
            *("patience_epochs", "lr_noise_pct", "lr_noise_std", "epochs"),
        )
        _require(self, lambda x: 0 < x < math.inf, "above 0", "clip_grad", "decay_epochs")
        _require(self, lambda x: 0 < x <= 1, "in (0, 1]", "decay_rate")
        _require(self, lambda x: 0 <= x < 1, "in [0, 1)", "momentum")
        _require(self, lambda x: all(0 <= b < 1 for b in x), "two numbers in [0, 1)", "opt_betas")
        _require(
            self,
            lambda x: len(x) in (1, 2) and all(0 <= share <= 1 for share in x),
            "one or two shares in [0, 1]",
            "lr_noise",
        )
        _require(self, lambda x: x >= 1, "at least 1", "grad_accum_steps", "refit_every_epochs")
        _require(
            self,
            lambda x: all(a < b for a, b in pairwise((0, *x))),
            "rising numbers of epochs",
            "decay_milestones",
        )
        if self.sched == "multistep" and not self.decay_milestones:
            raise InputError("sched multistep drops nowhere; give --decay-milestones 8 11, say.")


@dataclass(frozen=True)
class DistillationConfig:
    """What a model learns from its softmax parent."""

    distill: Literal["none", "output", "logits", "both"] = "none"
    """Match the teacher's attention outputs, its logits in place of the labels, or both."""
    distill_weight: float = 50.0
    """Weight of the attention outputs' mean squared error."""
    teacher: str | None = None
    """Checkpoint of the softmax parent: file, URL or zoo name."""
    align_steps: int = 0
    """Steps at first in which each attention layer gets the input that the teacher's has."""

    def __post_init__(self) -> None:
        _require(self, lambda x: 0 <= x < math.inf, "at least 0", "distill_weight", "align_steps")

    @property
    def compares_outputs(self) -> bool:
        return self.distill in ("output", "both")

    @property
    def compares_logits(self) -> bool:
        return self.distill in ("logits", "both")


@dataclass(frozen=True)
class RunConfig:
    """What to do, where, and from which weights."""

    task: str = "classification"
    """What the model learns."""
    config: str | None = None
    """Configuration file, Python or a run's config.yaml; flags win over it."""
    finetune: str | None = None
    """Weights of the earlier stage: file, URL or zoo name."""
    allow_missing: bool = False
    """Let backbone weights that --finetune does not give stay as they were drawn."""
    resume: str | None = "auto"
    """Checkpoint to go on from: file, URL or zoo name; auto: the output folder's newest, if any."""
    eval: bool = False
    """Only measure the accuracy."""
    throughput: Literal["median", "released"] | None = None
    """Only measure images/s: median and spread, or the released protocol (50 warm-up, 30 timed)."""
    output_dir: str = ""
    """Folder of the run; empty: runs/<name of the config file, else of the model>."""
    device: str | None = None
    """cuda, cuda:1, cpu ...; None: CUDA where there is one."""
    seed: int = 0
    """Seed of every random number."""
    start_epoch: int = 0
    """First epoch, where no checkpoint says it."""
    amp_dtype: Literal["float16", "bfloat16", "none"] | None = None
    """Type of mixed precision; None: float16 on CUDA, none on the CPU."""
    train_mode: bool | None = None
    """Train in train mode (--train-mode) or eval mode; None: eval mode exactly with --finetune."""
    compile: bool = False
    """Compile the model with torch.compile."""
    compile_mode: Literal["default", "reduce-overhead"] = "default"
    """Of torch.compile; reduce-overhead replays small batches as CUDA graphs."""
    deterministic: bool = False
    """On CUDA, take kernels that give equal bits each time, as going on exactly needs there."""
    checkpoint_every: float = 0.0
    """Minutes between checkpoints inside an epoch; 0: at its end only."""
    allow_resume_change: tuple[Literal["world-size", "batch-size", "config", "data"], ...] = ()
    """What may differ from the run that is resumed; the result then differs too."""
    dist_timeout: float = 10.0
    """Minutes that a rank waits for the others before the run ends; longer than a fit lasts."""

    def __post_init__(self) -> None:
        _require(self, lambda x: x >= 0, "at least 0", "seed", "start_epoch")
        _require(self, lambda x: 0 <= x < math.inf, "at least 0", "checkpoint_every")
        _require(self, lambda x: 0 < x <= 1e5, "above 0, at most 100,000", "dist_timeout")

    @property
    def is_train_mode(self) -> bool:
        """Whether the network trains in train mode (drop path on)."""
        return not self.finetune if self.train_mode is None else self.train_mode


@dataclass(frozen=True)
class Config:
    """All settings of one run."""

    model: ModelConfig = field(default_factory=ModelConfig)
    hashing: HashConfig = field(default_factory=HashConfig)
    data: DataConfig = field(default_factory=DataConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    distillation: DistillationConfig = field(default_factory=DistillationConfig)
    run: RunConfig = field(default_factory=RunConfig)

    def to_flat(self) -> dict[str, Any]:
        """Lay the fields of all sections side by side, in types that YAML and JSON know."""
        sections = asdict(self).values()
        values = {name: value for section in sections for name, value in section.items()}
        return {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}

    @classmethod
    def from_flat(cls, values: Mapping[str, object], base: Config | None = None) -> Config:
        """Set fields by name.

        Args:
            values: lists serve as tuples.
            base: keeps what ``values`` leaves out; the defaults if not given.

        Raises:
            InputError: no such field, or a value of the wrong type or out of range.
        """
        sections: dict[str, dict[str, Any]] = {section.name: {} for section in fields(cls)}
        for name, value in values.items():
            check_type(name, value)
            sections[_field_sections()[name]][name] = (
                tuple(value) if isinstance(value, list) else value
            )
        base = base or cls()
        return cls(**{name: replace(getattr(base, name), **sections[name]) for name in sections})


def check_type(name: str, value: object, label: str | None = None) -> None:
    """Raise InputError, which calls the field by its label, where it takes no such value."""
    types = field_types()
    if name not in types:
        raise InputError(f"there is no field {name!r}{suggest(name, types)}")
    # More would overflow somewhere below, and may be too long to print.
    if isinstance(value, int) and value.bit_length() > 63:
        raise InputError(f"{label or name} has {value.bit_length()} bits; a number has 63 at most.")
    if not fits(value, types[name]):
        raise InputError(f"{label or name} is {value!r}; expected {spell(types[name])}.")


def describe_changes(old: Mapping[str, object], new: Mapping[str, object]) -> dict[str, str]:
    """Map each field that differs between two flat configurations to ``"old -> new"``.

    A field that one of them lacks had its default.
    """
    defaults = Config().to_flat()
    before, after = {**defaults, **old}, {**defaults, **new}
    return {
        name: f"{before.get(name)!r} -> {after.get(name)!r}"
        for name in {**before, **after}
        if before.get(name) != after.get(name)
    }


@cache
def field_types() -> dict[str, Any]:
    """Map the fields of all sections to their types."""
    sections = get_type_hints(Config).values()
    return {name: hint for section in sections for name, hint in get_type_hints(section).items()}


@cache
def _field_sections() -> dict[str, str]:
    sections = get_type_hints(Config).items()
    return {field.name: name for name, section in sections for field in fields(section)}


def _require(section: object, test: Callable[[Any], bool], expected: str, *names: str) -> None:
    """Raise for the first field that is given and fails the test; NaN fails any."""
    for name in names:
        value = getattr(section, name)
        if value is not None and not test(value):
            raise InputError(f"{name} is {value!r}; expected {expected}.")
