"""Converts public models by one call each, checks them, and writes the table of docs/models.md.

python -m bench.models run [--out runs/models.jsonl] [--pattern 'timm/*'] [--seconds 60]
python -m bench.models table runs/models.jsonl

The libraries are not among this project's dependencies; those that are not installed are left out.
No weights are downloaded. Each model and weight of the shortcuts is converted in a process of its
own, so that a crash is a row; rows are written as they come, and a second run adds what is missing.
"""

from __future__ import annotations

import argparse
import copy
import fnmatch
import importlib.util
import json
import math
import subprocess
import sys
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from fusedshape import ActSpec, convert, unfuse
from fusedshape import nn as shaped
from fusedshape.machine import headline, provenance
from fusedshape.reference import shaped_act
from fusedshape.theory import TAT

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs/models.md"
#: The weights of the shortcuts; 0 is the vanilla network.
WEIGHTS = (0.0, 0.8)
#: Largest relative difference to plain PyTorch in float64, of outputs and of gradients.
EXACT = 1e-9


class Public(NamedTuple):
    """A public model: makes it, and an input of it."""

    name: str
    make: Callable[[], nn.Module]
    size: tuple[int, ...] = (2, 3, 64, 64)

    def inputs(self) -> tuple[Tensor, ...]:
        """What the model is called with."""
        generator = torch.Generator().manual_seed(0)
        return (torch.randn(self.size, generator=generator, dtype=torch.float64),)


def catalogue() -> Iterator[Public]:
    """All models of the libraries that are installed."""
    for library, models in LIBRARIES.items():
        if importlib.util.find_spec(library) is not None:
            yield from models()


def _torchvision() -> Iterator[Public]:
    import torchvision.models as tv

    for name in tv.list_models():
        family, _, kind = name.partition("_")
        if name.startswith(("quantized", "raft", "mvit", "swin3d", "s3d")) or kind == "rpn":
            continue
        build: Any = lambda name=name: tv.get_model(name, weights=None, **_backbone(name))  # noqa: E731
        where, size = "tv", (2, 3, 64, 64)
        if tv.get_model_builder(name).__module__.startswith("torchvision.models.detection"):
            continue
        if ".video" in tv.get_model_builder(name).__module__:
            where, size = "tvvid", (2, 3, 8, 64, 64)
        if ".segmentation" in tv.get_model_builder(name).__module__:
            where = "tvseg"
        if family in ("vit", "maxvit"):
            size = (2, 3, 224, 224)
        if name == "inception_v3":
            size = (2, 3, 96, 96)
        yield Public(f"{where}/{name}", build, size)


def _backbone(name: str) -> dict[str, Any]:
    import torchvision.models as tv

    segments = ".segmentation" in tv.get_model_builder(name).__module__
    init = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
    return {"weights_backbone": None} if segments else init


def _timm() -> Iterator[Public]:
    import timm

    for name in TIMM.split():
        fixed = timm.get_pretrained_cfg(name)
        size = fixed.input_size if fixed is not None and fixed.fixed_input_size else (3, 96, 96)
        build: Any = lambda name=name: timm.create_model(name, pretrained=False)  # noqa: E731
        yield Public(f"timm/{name}", build, (2, *size))


def _smp() -> Iterator[Public]:
    import segmentation_models_pytorch as smp

    decoders = "Unet UnetPlusPlus FPN Linknet PSPNet PAN DeepLabV3Plus MAnet"
    for decoder in decoders.split():
        for encoder in ("resnet18", "mobilenet_v2", "efficientnet-b0"):
            kind: Any = getattr(smp, decoder)
            build: Any = lambda kind=kind, e=encoder: kind(e, encoder_weights=None)  # noqa: E731
            yield Public(f"smp/{decoder}-{encoder}", build)


def _transformers() -> Iterator[Public]:
    import transformers as tf

    own = "ResNet RegNet ConvNext ConvNextV2 MobileNetV1 MobileNetV2 EfficientNet"
    for name in own.split():
        kind, config = getattr(tf, f"{name}Model"), getattr(tf, f"{name}Config")
        yield Public(f"hf/{name}", lambda kind=kind, config=config: kind(config()))


def _monai() -> Iterator[Public]:
    from monai.networks import nets

    flat: dict[str, Any] = {"spatial_dims": 2, "in_channels": 3, "out_channels": 4}
    yield Public("monai/DenseNet121", lambda: nets.DenseNet121(**flat))
    yield Public("monai/BasicUNet", lambda: nets.BasicUNet(**flat))
    yield Public("monai/SegResNet", lambda: nets.SegResNet(**flat))
    unet: dict[str, Any] = {"channels": (8, 16, 32), "strides": (2, 2), "num_res_units": 2}
    yield Public("monai/UNet", lambda: nets.UNet(**flat, **unet))
    yield Public("monai/VNet", lambda: nets.VNet(**flat))
    yield Public("monai/HighResNet", lambda: nets.HighResNet(**flat))
    yield Public("monai/SEResNet50", lambda: nets.SEResNet50(spatial_dims=2, in_channels=3))
    yield Public("monai/resnet18", lambda: nets.resnet18(spatial_dims=2, n_input_channels=3))
    yield Public("monai/AttentionUnet", lambda: nets.AttentionUnet(2, 3, 4, (8, 16, 32), (2, 2)))


def _efficientnet() -> Iterator[Public]:
    from efficientnet_pytorch import EfficientNet

    for i in range(4):
        name = f"efficientnet-b{i}"
        yield Public(f"effnet/{name}", lambda name=name: EfficientNet.from_name(name))


def _pytorchcv() -> Iterator[Public]:
    from pytorchcv.model_provider import get_model

    for name in CV.split():
        build: Any = lambda name=name: get_model(name, pretrained=False)  # noqa: E731
        yield Public(f"cv/{name}", build, (2, 3, 224, 224))


LIBRARIES: dict[str, Callable[[], Iterator[Public]]] = {
    "torchvision": _torchvision,
    "timm": _timm,
    "segmentation_models_pytorch": _smp,
    "transformers": _transformers,
    "monai": _monai,
    "efficientnet_pytorch": _efficientnet,
    "pytorchcv": _pytorchcv,
}
#: One of each of timm's families, the smallest.
TIMM = """
cait_xxs24_224 coat_tiny coatnet_nano_rw_224 convmixer_768_32 convnext_atto convnextv2_atto
crossvit_tiny_240 cs3darknet_s cspdarknet53 cspresnet50 darknet17 davit_tiny deit_tiny_patch16_224
densenet121 densenetblur121d dla34 dla46_c dm_nfnet_f0 dpn48b dpn68 eca_nfnet_l0 ecaresnet26t
edgenext_xx_small efficientformer_l1 efficientformerv2_s0 efficientnet_b0 efficientnet_es
efficientnet_lite0 efficientnetv2_rw_t efficientvit_b0 efficientvit_m0 ese_vovnet19b_dw
eva02_tiny_patch14_224 fasternet_t0 fastvit_t8 fbnetc_100 focalnet_tiny_srf gc_efficientnetv2_rw_t
ghostnet_050 ghostnetv2_100 ghostnetv3_050 hardcorenas_a hgnet_tiny hgnetv2_b0 hrnet_w18_small
inception_next_atto inception_resnet_v2 inception_v3 inception_v4 lcnet_035 legacy_senet154
legacy_seresnet18 legacy_xception mixnet_s mnasnet_small mobilenet_edgetpu_v2_xs mobilenetv1_100
mobilenetv2_035 mobilenetv3_small_050 mobilenetv4_conv_small mobilenetv4_hybrid_medium
mobileone_s0 mobilevit_xxs mobilevitv2_050 nf_ecaresnet26 nf_regnet_b0 nf_resnet26 nf_seresnet26
nfnet_l0 regnetv_040 regnetx_002 regnety_002 regnetz_005 repghostnet_050 repvgg_a0 repvit_m0_9
res2net50_14w_8s res2next50 resnest14d resnet10t resnet26 resnet50d resnetaa50 resnetblur50
resnetrs50 resnetv2_50 resnetv2_50d_gn resnext50_32x4d rexnet_100 rexnetr_100 selecsls42
semnasnet_050 seresnet18 skresnet18 spnasnet_100 starnet_s1 test_efficientnet tf_efficientnet_b0
tinynet_e tresnet_m vgg11 vgg11_bn vovnet39a xception41 xception65
"""
CV = """
alexnet vgg11 bn_vgg11 resnet18 preresnet18 resnext26_16x4d seresnet18 sepreresnet18 senet16
resnesta18 ibn_resnet50 airnet50_1x64d_r2 bam_resnet18 cbam_resnet18 sknet50 regnetx002 regnety002
diaresnet10 sharesnet18 densenet121 sparsenet121 peleenet wrn50_2 drnc26 darknet_tiny darknet53
dla34 msdnet22 hrnet_w18_small_v1 selecsls42 squeezenet_v1_0 squeezeresnet_v1_0 sqnxt23_w1
shufflenet_g1_wd4 shufflenetv2_wd2 menet108_8x1_g3 mobilenet_wd4 fdmobilenet_wd4 mobilenetv2_wd4
mobilenetv3_small_wd2 igcv3_wd4 mnasnet_b1 darts proxylessnas_cpu fbnet_cb xception inceptionv3
inceptionv4 polynet nasnet_4a1056 pnasnet5large spnasnet efficientnet_b0 mixnet_s resneta10
resnetd50b bagnet9 voxnet
"""


class Outcome(NamedTuple):
    """What became of one model.

    Attributes:
        status: "ok"; "wrong", its numbers differ from plain PyTorch's; "refused" with a reason of
            ours; "crash", any other error; "timeout".
        why: the message.
        seconds: of convert.
        counts: the report's.
        left: why activations are not fused, with their numbers.
        healthy: whether diagnose finds theory and measurement in agreement; None if it did not run.
        verdict: diagnose's.
        error: the largest relative difference of outputs and gradients.
    """

    status: str
    why: str = ""
    seconds: float = 0.0
    counts: Mapping[str, int] = MappingProxyType({})
    left: Mapping[str, int] = MappingProxyType({})
    healthy: bool | None = None
    verdict: str = ""
    error: float | None = None


def try_model(public: Public, weight: float) -> Outcome:
    """Convert a model, and hold it against plain PyTorch."""
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    model, inputs = public.make().double().train(), public.inputs()
    start = time.monotonic()
    try:
        report = convert(
            model,
            TAT("leaky_relu"),
            normalisation="strip",
            shortcuts=weight,
            replace="all",
            on_untraceable="report",
            on_ambiguous="report",
            example=inputs,
        )
    except (ValueError, TypeError) as error:
        ours = str(error).startswith(("convert:", "reweight_shortcuts:"))
        where = "" if ours else traceback.format_exc(limit=-3)
        return Outcome("refused" if ours else "crash", f"{error} {where}".strip())
    seconds = time.monotonic() - start
    error = difference(model.eval(), inputs)
    left = Counter(row.note[:60] for row in report.changes if "not fused" in row.note)
    health = getattr(report, "health", None)
    return Outcome(
        "ok" if error <= EXACT else "wrong",
        seconds=round(seconds, 2),
        counts={name: count for name, count in report.counts.items() if count},
        left=dict(left.most_common(5)),
        healthy=None if health is None else bool(health.agrees),
        verdict="" if health is None else str(health.verdict),
        error=error if math.isfinite(error) else None,
    )


def difference(model: nn.Module, inputs: tuple[Tensor, ...]) -> float:
    """How far a model's outputs and gradients lie from those of its layers in plain PyTorch."""
    plain = copy.deepcopy(model)
    unfuse(plain)
    for module in list(plain.modules()):
        for name, child in module.named_children():
            if isinstance(child, shaped.ShapedActivation):
                setattr(module, name, Plain(child.spec))
            elif isinstance(child, shaped.NormalizedSum):
                setattr(module, name, PlainSum(child.weights))
    assert not any(type(m).__module__ == shaped.__name__ for m in plain.modules())
    found = [_outputs_and_gradients(one, inputs) for one in (model, plain)]
    pairs = zip(*found, strict=True)
    return max((_relative(a, b) for a, b in pairs), default=0.0)


class Plain(nn.Module):
    """A shaped activation in torch's own functions."""

    def __init__(self, spec: ActSpec) -> None:
        super().__init__()
        self.spec = spec

    def forward(self, x: Tensor) -> Tensor:
        """y = γ(φ(αx + β) + δ)."""
        return shaped_act(x, self.spec)


class PlainSum(nn.Module):
    """A weighted sum."""

    def __init__(self, weights: Any) -> None:
        super().__init__()
        self.weights = [float(w) for w in weights]

    def forward(self, *terms: Tensor) -> Tensor:
        """Σ wᵢuᵢ."""
        return sum((w * t for w, t in zip(self.weights, terms, strict=True)), torch.zeros(()))


def _outputs_and_gradients(model: nn.Module, inputs: tuple[Tensor, ...]) -> list[Tensor]:
    torch.manual_seed(0)
    out = [t for t in tree_leaves(model(*inputs)) if isinstance(t, Tensor)]
    parameters = [p for p in model.parameters() if p.requires_grad]
    total = sum((t.square().mean() for t in out if t.is_floating_point()), torch.zeros(()))
    gradients = torch.autograd.grad(total, parameters, allow_unused=True)
    zeros = [torch.zeros(()) if g is None else g for g in gradients]
    return [*(t.detach() for t in out), *zeros]


def _relative(a: Tensor, b: Tensor) -> float:
    if a.shape != b.shape or not a.isfinite().all() or not b.isfinite().all():
        return math.inf
    scale = b.double().abs().max().item() if b.numel() else 0.0
    most = (a.double() - b.double()).abs().max().item() if b.numel() else 0.0
    return most / scale if scale else most


def main() -> int:
    """Run the program; 1 if a model crashed or came out wrong."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    commands = parser.add_subparsers(required=True, dest="command")
    run = commands.add_parser("run", help="convert models")
    run.add_argument("--out", type=Path, default=Path("runs/models.jsonl"))
    run.add_argument("--pattern", default="*", help="shell pattern of LIBRARY/MODEL")
    run.add_argument("--every", type=int, default=1, help="only every so manieth model")
    run.add_argument("--seconds", type=float, default=120.0, help="limit of one model")
    one = commands.add_parser("one", help="convert one model, and print its row")
    one.add_argument("name")
    one.add_argument("weight", type=float)
    table = commands.add_parser("table", help="write docs/models.md")
    table.add_argument("file", type=Path)
    args = parser.parse_args()
    if args.command == "one":
        warnings.simplefilter("ignore")
        public = next(model for model in catalogue() if model.name == args.name)
        print(json.dumps(try_model(public, args.weight)._asdict()))
        return 0
    if args.command == "table":
        PAGE.write_text(page(_rows(args.file)))
        return 0
    names = fnmatch.filter((model.name for model in catalogue()), args.pattern)[:: args.every]
    return convert_all(names, args.out, args.seconds)


def convert_all(names: list[str], out: Path, seconds: float) -> int:
    """Convert models in processes of their own; 1 if one crashed or came out wrong."""
    out.parent.mkdir(parents=True, exist_ok=True)
    known = {(row["model"], row["weight"]) for row in _rows(out)} if out.exists() else set()
    todo = [(name, w) for name in names for w in WEIGHTS if (name, w) not in known]
    for i, (name, weight) in enumerate(todo):
        found = _in_a_process(name, weight, seconds)._asdict()
        found |= {key: dict(found[key]) for key in ("counts", "left")}
        row = {"model": name, "weight": weight, **found}
        with out.open("a") as file:
            file.write(json.dumps(row if i else {**row, **provenance()}) + "\n")
        why = row["why"] or row["verdict"]
        print(f"{i + 1}/{len(todo)} {row['status']:8}{name} {weight:g} {why[:150]}", flush=True)
    return int(any(row["status"] in ("crash", "wrong") for row in _rows(out)))


def _in_a_process(name: str, weight: float, seconds: float) -> Outcome:
    command = [sys.executable, "-m", "bench.models", "one", name, str(weight)]
    try:
        done = subprocess.run(
            command, cwd=ROOT, capture_output=True, text=True, timeout=seconds, check=False
        )
    except subprocess.TimeoutExpired:
        return Outcome("timeout", f"longer than {seconds:g} s")
    last = done.stdout.strip().splitlines()[-1:] or [""]
    if done.returncode or not last[0].startswith("{"):
        end = done.stderr.strip().splitlines()[-3:]
        return Outcome("crash", " / ".join(end) or f"exit code {done.returncode}")
    return Outcome(**json.loads(last[0]))


def _rows(path: Path) -> list[dict[str, Any]]:
    lines = path.read_text().splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]  # a run may have been killed


def page(rows: list[dict[str, Any]]) -> str:
    """The page of the table."""
    shares = [_share(rows, weight) for weight in WEIGHTS]
    libraries = sorted({row["model"].partition("/")[0] for row in rows})
    lines = [
        "# Public models",
        "",
        "What one call makes of models that others wrote:",
        "",
        "```",
        'convert(model, TAT(), normalisation="strip", shortcuts=w, replace="all",',
        '        on_untraceable="report", on_ambiguous="report", example=x)',
        "```",
        "",
        "A model is *ok* if its outputs and gradients are those of plain PyTorch in float64 to "
        f"{EXACT:g}, and *healthy* if `diagnose` finds what theory expects. Fused and left count "
        f"activations. {len({row['model'] for row in rows})} models of {', '.join(libraries)}; "
        f"{headline(rows[0])}; `{rows[0]['command']}`.",
        "",
        "| w | models | ok | healthy | refused | wrong | crashed | too slow | median seconds |",
        "|---|---|---|---|---|---|---|---|---|",
        *shares,
        "",
        "| model | w | outcome | fused | left | seconds | healthy, or why not |",
        "|---|---|---|---|---|---|---|",
        *(_line(row) for row in sorted(rows, key=lambda row: (row["model"], row["weight"]))),
    ]
    return "\n".join(lines) + "\n"


def _share(rows: list[dict[str, Any]], weight: float) -> str:
    own = [row for row in rows if row["weight"] == weight]
    status = Counter(row["status"] for row in own)
    healthy = sum(row["healthy"] is True for row in own)
    seconds = sorted(row["seconds"] for row in own if row["status"] == "ok") or [0.0]
    share = lambda n: f"{n} ({100 * n / max(len(own), 1):.0f} %)"  # noqa: E731
    cells = [f"{weight:g}", str(len(own)), share(status["ok"]), share(healthy)]
    cells += [str(status[name]) for name in ("refused", "wrong", "crash", "timeout")]
    return f"| {' | '.join([*cells, f'{seconds[len(seconds) // 2]:.1f}'])} |"


def _line(row: dict[str, Any]) -> str:
    counts = row["counts"]
    what = row["why"] or ("yes" if row["healthy"] else row["verdict"] or "not asked")
    cells = [row["model"], f"{row['weight']:g}", row["status"], str(counts.get("fused", 0))]
    cells += [str(counts.get("shaped", 0)), f"{row['seconds']:.1f}"]
    return f"| {' | '.join([*cells, ' '.join(what.split())[:160].replace('|', '/')])} |"


if __name__ == "__main__":
    sys.exit(main())
