"""Networks of torchvision, timm and transformers with random weights, for tests and benchmarks.

Nothing is downloaded. Every network is built from one seed, and its batch-norm statistics, affine
parameters and other constant-initialised parameters are drawn at random, so that a transformation
that forgets one of them changes the result. torchvision, timm and transformers are imported when
a network of theirs is built.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

SEED = 20260
VOCABULARY = 1000


@dataclass(frozen=True)
class Inputs:
    """Positional and keyword inputs of one call."""

    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] | None = None

    def example(self) -> Any:
        """In the form that `graphopt.optimize` takes: a tuple, or a dict of keyword inputs."""
        return self.kwargs if self.kwargs is not None else self.args

    def call(self, model: Callable[..., Any]) -> Any:
        return model(*self.args, **(self.kwargs or {}))

    def to(self, dtype: torch.dtype) -> Inputs:
        """The same inputs with floating-point tensors of `dtype`; integers stay as they are."""

        def cast(value: Any) -> Any:
            floating = isinstance(value, Tensor) and value.is_floating_point()
            return value.to(dtype) if floating else value

        kwargs = self.kwargs
        return Inputs(
            tuple(cast(value) for value in self.args),
            None if kwargs is None else {name: cast(value) for name, value in kwargs.items()},
        )


@dataclass(frozen=True)
class Network:
    """One network of the zoo.

    `build_at(size)` makes the bare module for inputs of `size` (pixels of a side, tokens, or
    samples of sound), `inputs_at(batch, size, generator)` makes its inputs. `small` is a size for
    tests, `native` the size that the network was designed for. `tags` are words that say what it
    is made of.
    """

    name: str
    library: str
    tags: str
    build_at: Callable[[int], nn.Module]
    inputs_at: Callable[[int, int, torch.Generator], Inputs]
    small: int
    native: int

    def build(self, size: int) -> nn.Module:
        """The network in eval mode, float32, the same at every call."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(SEED)
            model = self.build_at(size).eval().requires_grad_(False)
            generator = torch.Generator().manual_seed(SEED)
            with torch.no_grad():
                _randomize_constants(model, generator)
                with _batch_norm_calibration(model, generator):
                    self.inputs_at(8, size, generator).call(model)
        return model

    def inputs(self, batch: int, size: int, seed: int = 0) -> Inputs:
        return self.inputs_at(batch, size, torch.Generator().manual_seed(SEED + seed))


def _uniform(low: float, high: float, like: Tensor, generator: torch.Generator) -> Tensor:
    return torch.rand(like.shape, generator=generator) * (high - low) + low


def _normal(scale: float, like: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randn(like.shape, generator=generator) * scale


def _randomize_constants(model: nn.Module, generator: torch.Generator) -> None:
    """Replaces parameters that an initialiser made constant: biases of 0, gains of 1 or 1e-6."""
    for parameter in model.parameters():
        first = parameter.flatten()[0].item()
        if not parameter.is_floating_point() or not bool((parameter == first).all()):
            continue
        if first == 0 and parameter.ndim > 1:
            fan_in = parameter[0].numel()
            parameter.copy_(_normal(fan_in**-0.5, parameter, generator))
        elif first == 0:
            parameter.copy_(_normal(0.1, parameter, generator))
        elif abs(first) < 0.1:  # the gain of a residual branch, started near zero
            parameter.copy_(_uniform(0.1, 0.3, parameter, generator))
        else:
            parameter.copy_(first * _uniform(0.7, 1.3, parameter, generator))


@contextmanager
def _batch_norm_calibration(model: nn.Module, generator: torch.Generator) -> Iterator[None]:
    """During a call, gives each batch norm the statistics of its input, a little off.

    Each layer is set before it runs, so that later layers see what the perturbed one gives and
    activations keep their scale however deep the network is. Channels that do not vary get a
    variance of their layer's order.
    """

    def set_statistics(layer: nn.Module, args: tuple[Any, ...]) -> None:
        x: Tensor = args[0]
        dims = [dim for dim in range(x.ndim) if dim != 1]
        mean = x.mean(dims)
        variance = x.var(dims, correction=0)
        variance = variance.clamp_min(0.05 * float(variance.mean()) + 1e-4)
        mean = mean + variance.sqrt() * _normal(0.2, mean, generator)
        layer.running_mean.copy_(mean)
        layer.running_var.copy_(variance * _uniform(0.7, 1.4, variance, generator))

    handles = [
        layer.register_forward_pre_hook(set_statistics)
        for layer in model.modules()
        if isinstance(layer, nn.modules.batchnorm._BatchNorm) and layer.track_running_stats
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@functools.cache
def import_torchvision() -> Any:
    """torchvision, also where its compiled operators do not match the torch build.

    Its CUDA build imports beside a CPU torch once the two operators exist that it gives fake
    implementations for.
    """
    try:
        import torchvision
    except RuntimeError:
        global _torchvision_operators  # the definitions live as long as the library object
        _torchvision_operators = torch.library.Library("torchvision", "DEF")
        for operator in ("nms", "qnms"):
            _torchvision_operators.define(
                f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
            )
        import torchvision
    return torchvision


def _images(batch: int, size: int, generator: torch.Generator) -> Inputs:
    return Inputs((torch.randn(batch, 3, size, size, generator=generator),))


def _tokens(batch: int, size: int, generator: torch.Generator) -> Inputs:
    ids = torch.randint(1, VOCABULARY, (batch, size), generator=generator)
    return Inputs(kwargs={"input_ids": ids})


def _padded_tokens(batch: int, size: int, generator: torch.Generator) -> Inputs:
    ids = torch.randint(1, VOCABULARY, (batch, size), generator=generator)
    mask = torch.ones_like(ids)
    mask[-1, size - size // 4 :] = 0
    return Inputs(kwargs={"input_ids": ids, "attention_mask": mask})


def _sound(batch: int, size: int, generator: torch.Generator) -> Inputs:
    return Inputs((torch.randn(batch, size, generator=generator),))


def _pixel_values(batch: int, size: int, generator: torch.Generator) -> Inputs:
    return Inputs(kwargs={"pixel_values": torch.randn(batch, 3, size, size, generator=generator)})


def _torchvision(
    name: str,
    tags: str,
    *,
    small: int = 96,
    native: int = 224,
    sized: str | None = None,
    **options: Any,
) -> Network:
    """`sized` names the builder's argument for the image size, where it has one."""

    def build(size: int) -> nn.Module:
        models = import_torchvision().models
        named = {**options} if sized is None else {**options, sized: size}
        return models.get_model(name, weights=None, **named)

    return Network(name, "torchvision", tags, build, _images, small, native)


def _timm(
    name: str, tags: str, *, small: int = 96, native: int = 224, sized: bool = False
) -> Network:
    def build(size: int) -> nn.Module:
        import_torchvision()
        import timm

        options = {"img_size": size} if sized else {}
        return timm.create_model(name, pretrained=False, **options)

    return Network(f"timm/{name}", "timm", tags, build, _images, small, native)


def _transformers(
    name: str,
    model: str,
    tags: str,
    inputs: Callable[[int, int, torch.Generator], Inputs],
    *,
    small: int = 16,
    native: int = 128,
    sized: bool = False,
    **options: Any,
) -> Network:
    """`model` is the name of a class, `options` are fields of its config."""

    def build(size: int) -> nn.Module:
        import_torchvision()
        import transformers

        # several times the usual scale: attention is to choose, not to average
        named = {"initializer_range": 0.08, **options}
        if sized:
            named["image_size"] = size
        model_class = getattr(transformers, model)
        return model_class(model_class.config_class(**named))

    full_name = f"transformers/{name}"
    return Network(full_name, "transformers", tags, build, inputs, small, native)


_TORCHVISION = (
    _torchvision("resnet18", "convolution residual"),
    _torchvision("resnet50", "convolution residual"),
    _torchvision("resnext50_32x4d", "convolution residual grouped"),
    _torchvision("mobilenet_v2", "convolution mobile"),
    _torchvision("mobilenet_v3_small", "convolution mobile squeeze-excite"),
    _torchvision("mobilenet_v3_large", "convolution mobile squeeze-excite"),
    _torchvision("mnasnet1_0", "convolution mobile"),
    _torchvision("efficientnet_b0", "convolution mobile squeeze-excite"),
    _torchvision("efficientnet_v2_s", "convolution mobile squeeze-excite", native=384),
    _torchvision("shufflenet_v2_x1_0", "convolution mobile shuffle"),
    _torchvision("squeezenet1_1", "convolution concatenation"),
    _torchvision("densenet121", "convolution concatenation"),
    _torchvision("googlenet", "convolution concatenation", init_weights=False),
    _torchvision("inception_v3", "convolution concatenation", native=299, init_weights=False),
    _torchvision("vgg11_bn", "convolution plain"),
    _torchvision("alexnet", "convolution plain"),
    _torchvision("regnet_y_400mf", "convolution residual grouped squeeze-excite"),
    _torchvision("regnet_x_400mf", "convolution residual grouped"),
    _torchvision("convnext_tiny", "convolution layer-norm"),
    _torchvision("vit_b_32", "attention", sized="image_size"),
    _torchvision("swin_t", "attention window"),
    _torchvision("swin_v2_t", "attention window", native=256),
    # its windows tile the feature maps only where the image is a multiple of 224
    _torchvision("maxvit_t", "attention convolution window", small=224),
    _torchvision("fcn_resnet50", "convolution segmentation", native=256, weights_backbone=None),
    _torchvision(
        "deeplabv3_mobilenet_v3_large",
        "convolution segmentation",
        native=256,
        weights_backbone=None,
    ),
    _torchvision(
        "lraspp_mobilenet_v3_large",
        "convolution segmentation",
        native=256,
        weights_backbone=None,
    ),
)

_TIMM = (
    _timm("efficientnet_lite0", "convolution mobile"),
    _timm("ghostnet_100", "convolution mobile concatenation"),
    _timm("hardcorenas_a", "convolution mobile"),
    _timm("tinynet_e", "convolution mobile", native=106),
    _timm("rexnet_100", "convolution mobile"),
    _timm("lcnet_050", "convolution mobile"),
    _timm("repvgg_a0", "convolution branches"),
    _timm("mobileone_s0", "convolution branches"),
    _timm("fastvit_t8", "convolution branches", native=256),
    _timm("cspresnet50", "convolution residual", native=256),
    _timm("dla34", "convolution residual"),
    _timm("hrnet_w18_small", "convolution residual multi-scale"),
    _timm("res2net50_26w_4s", "convolution residual multi-scale"),
    _timm("selecsls42b", "convolution concatenation"),
    _timm("nf_resnet50", "convolution residual weight-standardised", native=256),
    _timm("gcresnet33ts", "convolution residual attention", native=256),
    _timm("convmixer_768_32", "convolution mixer"),
    _timm("mixer_s32_224", "mixer", sized=True),
    _timm("resmlp_12_224", "mixer", sized=True),
    _timm("poolformer_s12", "mixer convolution"),
    _timm("mobilevit_xxs", "attention convolution mobile", native=256),
    _timm("edgenext_xx_small", "attention convolution mobile", native=256),
    _timm("coatnet_0_rw_224", "attention convolution", sized=True),
    _timm("levit_128s", "attention convolution", sized=True),
    _timm("deit_tiny_patch16_224", "attention", sized=True),
    _timm("beit_base_patch16_224", "attention", sized=True),
    _timm("xcit_nano_12_p16_224", "attention", sized=True),
    _timm("crossvit_tiny_240", "attention multi-scale", native=240),
    _timm("pit_ti_224", "attention", sized=True),
    _timm("volo_d1_224", "attention", sized=True),
)

_SMALL = {
    "hidden_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "intermediate_size": 256,
}
_ENCODER = {**_SMALL, "vocab_size": VOCABULARY}
_DECODER = {**_ENCODER, "num_key_value_heads": 2, "use_cache": False}
_IMAGE_ENCODER = {**_SMALL, "small": 96, "native": 224, "sized": True}
_DISTILBERT = {"vocab_size": VOCABULARY, "dim": 128, "n_layers": 4, "n_heads": 4, "hidden_dim": 256}
_MOBILEBERT = {
    **_ENCODER,
    "embedding_size": 64,
    "intra_bottleneck_size": 64,
    "intermediate_size": 128,
}
_GPT2 = {
    "vocab_size": VOCABULARY,
    "n_embd": 128,
    "n_layer": 4,
    "n_head": 4,
    "use_cache": False,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
_T5 = {
    "vocab_size": VOCABULARY,
    "d_model": 128,
    "d_kv": 32,
    "d_ff": 256,
    "num_layers": 4,
    "num_heads": 4,
}
_WAV2VEC2 = {
    **_SMALL,
    "small": 2000,
    "native": 16000,
    "conv_dim": (64,) * 7,
    "num_conv_pos_embeddings": 32,
    "num_conv_pos_embedding_groups": 4,
}

_TRANSFORMERS = (
    _transformers("bert", "BertModel", "attention text", _padded_tokens, **_ENCODER),
    _transformers("roberta", "RobertaModel", "attention text", _tokens, **_ENCODER),
    _transformers(
        "electra", "ElectraModel", "attention text", _tokens, embedding_size=64, **_ENCODER
    ),
    _transformers(
        "albert", "AlbertModel", "attention text", _tokens, embedding_size=64, **_ENCODER
    ),
    _transformers("distilbert", "DistilBertModel", "attention text", _padded_tokens, **_DISTILBERT),
    _transformers("mobilebert", "MobileBertModel", "attention text", _tokens, **_MOBILEBERT),
    _transformers("gpt2", "GPT2LMHeadModel", "attention text causal", _tokens, **_GPT2),
    _transformers("llama", "LlamaForCausalLM", "attention text causal", _tokens, **_DECODER),
    _transformers("qwen2", "Qwen2ForCausalLM", "attention text causal", _tokens, **_DECODER),
    _transformers("t5_encoder", "T5EncoderModel", "attention text", _tokens, **_T5),
    _transformers("wav2vec2", "Wav2Vec2Model", "attention convolution sound", _sound, **_WAV2VEC2),
    _transformers("vit", "ViTModel", "attention", _pixel_values, **_IMAGE_ENCODER),
    _transformers(
        "clip_vision",
        "CLIPVisionModel",
        "attention",
        _pixel_values,
        patch_size=32,
        **_IMAGE_ENCODER,
    ),
    _transformers(
        "segformer",
        "SegformerForSemanticSegmentation",
        "attention convolution segmentation",
        _pixel_values,
        small=96,
        native=256,
        num_labels=19,
    ),
)

NETWORKS: dict[str, Network] = {
    network.name: network for network in (*_TORCHVISION, *_TIMM, *_TRANSFORMERS)
}

_CI = (
    "resnet18",
    "mobilenet_v3_small",
    "shufflenet_v2_x1_0",
    "lraspp_mobilenet_v3_large",
    "swin_t",
    "timm/repvgg_a0",
    "timm/mobilevit_xxs",
    "timm/resmlp_12_224",
    "transformers/bert",
    "transformers/gpt2",
    "transformers/llama",
    "transformers/wav2vec2",
)


def ci_networks() -> tuple[Network, ...]:
    """A dozen small networks of as many kinds: what every change is tested on."""
    return tuple(NETWORKS[name] for name in _CI)
