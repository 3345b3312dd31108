"""What a training run's logs say is wrong with it: symptom, evidence, remedy.

The limits are own choice, and stand in docs/diagnose.md.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from ..losses.adversarial import MAX_WEIGHT
from .command_line import RESOLVED_ARGUMENTS
from .tracking import METRICS_FILE

LATE = 0.25  # what "at the end" means: the last quarter of the steps
FEWEST = 4  # lines of a curve below which it says nothing


class Curves:
    """What metrics.jsonl holds: `curves[name]` is a list of (step, value), without what was not finite.

    Args:
        records: its lines, in order.
        arguments: of the run, by name; {} where they are not known.
    """

    def __init__(self, records: Sequence[Mapping[str, Any]], arguments: Mapping[str, Any]) -> None:
        self.arguments = arguments
        self._curves: dict[str, list[tuple[int, float]]] = {}
        for record in records:
            for name, value in record.items():
                if name != "step" and value is not None:
                    self._curves.setdefault(name, []).append((int(record["step"]), float(value)))
        self.steps = max((int(record["step"]) for record in records), default=0)

    def __contains__(self, name: str) -> bool:
        return name in self._curves

    def __getitem__(self, name: str) -> list[tuple[int, float]]:
        return self._curves.get(name, [])

    def channels(self, name: str) -> list[str]:
        """The curves NAME/0, NAME/1 ... of a vector."""
        return sorted((each for each in self._curves if each.startswith(f"{name}/")), key=lambda each: len(each))

    def first(self, name: str) -> float:
        return self[name][0][1]

    def last(self, name: str) -> float:
        return self[name][-1][1]

    def late(self, name: str, *, since: int = 0) -> float | None:
        """The mean over the last quarter of the steps from `since` on; None where a curve is too short to say."""
        begin = since + (1 - LATE) * (self.steps - since)
        values = [value for step, value in self[name] if step >= begin]
        count = sum(step >= since for step, _ in self[name])
        return sum(values) / len(values) if values and count >= FEWEST else None

    def mean(self, name: str, begin: int, end: int) -> float | None:
        """Over the steps begin <= step < end; None where there is none."""
        values = [value for step, value in self[name] if begin <= step < end]
        return sum(values) / len(values) if values else None


class Rule(NamedTuple):
    """One sickness: `look` gives the evidence in words, or None where there is none.

    Args:
        symptom: its name.
        needs: curves without which it is not looked for.
        look: at the curves of a run.
        remedy: what to do, in words.
    """

    symptom: str
    needs: tuple[str, ...]
    look: Callable[[Curves], str | None]
    remedy: str


RULES: list[Rule] = []


def _sickness(symptom: str, *, needs: tuple[str, ...], remedy: str) -> Callable[..., Any]:
    """Makes a rule of a look at the curves, next in the order of the report."""

    def add(look: Callable[[Curves], str | None]) -> Callable[[Curves], str | None]:
        RULES.append(Rule(symptom, needs, look, remedy))
        return look

    return add


@_sickness(
    "collapse",
    needs=("latent_std/0",),
    remedy="Go back to a checkpoint before it. Leave out or weaken what pulls on the latents alone (--regularizers "
    "explicit, --kl_weight); --regularizers equivariance asks the same through the decoder.",
)
def _collapse(curves: Curves) -> str | None:
    """Channels whose std fell to a tenth on average, or one that has a hundredth of the largest one's."""
    stds = {name: value for name in curves.channels("latent_std") if (value := curves.late(name)) is not None}
    if not stds:
        return None
    first, last = (sum(values) / len(stds) for values in (map(curves.first, stds), stds.values()))
    if last < 0.1 * first:
        return f"the standard deviation of the latent channels fell from {first:.3g} to {last:.3g} (latent_std/N)"
    dead = [name.rpartition("/")[2] for name, value in stds.items() if value < 0.01 * max(stds.values())]
    if dead:
        return f"latent channels {', '.join(dead)} vary by less than 1 % of the largest at the end (latent_std/N)"
    return None


@_sickness(
    "std drift",
    needs=("validation/latent_std",),
    remedy="The scaling factor that the autoencoder came with does not fit any more: finish with --normalization "
    "channel or scalar, or hold the latents with a larger --kl_weight or --regularizers latent_anchor.",
)
def _std_drift(curves: Curves) -> str | None:
    """Latents of a fine-tuned autoencoder whose size changed by more than a factor of 2, and did not collapse."""
    if not curves.arguments.get("pretrained_model_name_or_path") or _collapse(curves):
        return None
    first, last = curves.first("validation/latent_std"), curves.last("validation/latent_std")
    if 0.5 * first <= last <= 2 * first:
        return None
    return f"the standard deviation of the latents went from {first:.3g} to {last:.3g} (validation/latent_std)"


@_sickness(
    "colour shift",
    needs=("validation/colour_shift",),
    remedy="Lower --disc_weight or begin it later (--disc_start), and lower --learning_rate.",
)
def _colour_shift(curves: Curves) -> str | None:
    """A channel's mean that is off by 6 of 255 levels, and by more than at the first validation."""
    first, last = curves.first("validation/colour_shift"), curves.last("validation/colour_shift")
    if last <= 0.05 or last <= 1.5 * first:
        return None
    return f"reconstructions are off by {127.5 * last:.1f} of 255 levels on average, {127.5 * first:.1f} at first"


@_sickness(
    "blur",
    needs=("validation/sharpness",),
    remedy="Raise --perceptual_weight or --disc_weight, or weaken the regularizer: --p_equivariance, --noise_gamma, "
    "--local_correlation_weight.",
)
def _blur(curves: Curves) -> str | None:
    """Reconstructions that lost two fifths of their detail (noise aside), or have a fifth of the images'."""
    first, last = curves.first("validation/sharpness"), curves.last("validation/sharpness")
    if last >= 0.6 * min(first, 1.0) and last >= 0.2:
        return None
    return f"reconstructions hold {last:.0%} of the images' detail, {first:.0%} at first (validation/sharpness)"


@_sickness(
    "grid",
    needs=("validation/grid",),
    remedy="Lower --disc_weight or begin it later (--disc_start), and lower --learning_rate.",
)
def _grid(curves: Curves) -> str | None:
    """An error of which a tenth repeats from cell to cell, and more than at the first validation."""
    first, last = curves.first("validation/grid"), curves.last("validation/grid")
    if last <= 0.1 or last <= 1.5 * first:
        return None
    return f"{last:.0%} of the error's variance repeats in every latent cell, {first:.0%} at first (validation/grid)"


def _adversarial(curves: Curves) -> tuple[float, float, float] | None:
    """Late means of the discriminator's loss and its logits of real and fake; None while it is young."""
    begin = int(curves.arguments.get("disc_start") or 0)
    names = ("loss/discriminator", "logits/real", "logits/fake")
    loss, real, fake = (curves.late(name, since=begin) for name in names)
    return None if loss is None or real is None or fake is None else (loss, real, fake)


@_sickness(
    "discriminator too strong",
    needs=("loss/discriminator",),
    remedy="Begin it later (--disc_start), lower --disc_weight, or give it fewer --disc_channels. At the limit of the "
    "adaptive weight: --adaptive_disc_weight false, with a --disc_weight of your own.",
)
def _discriminator_too_strong(curves: Curves) -> str | None:
    """A loss of a twentieth of what guessing costs (hinge 1, vanilla .69), or an adaptive weight at its limit."""
    found = _adversarial(curves)
    weight, asked = curves.late("adversarial_weight"), float(curves.arguments.get("disc_weight") or 0.5)
    if (
        curves.arguments.get("adaptive_disc_weight", True)
        and weight is not None
        and weight >= 0.9 * asked * MAX_WEIGHT
    ):
        return f"the adaptive weight stands at its limit, {weight:.3g} (adversarial_weight)"
    if found is None or found[0] >= 0.05:
        return None
    return f"the discriminator's loss is {found[0]:.3g}, its logits {found[1]:.2f} of real and {found[2]:.2f} of fake"


@_sickness(
    "discriminator too weak",
    needs=("loss/discriminator",),
    remedy="Give it more --disc_channels or --disc_num_layers, a trained one (--disc_pretrained), or more steps.",
)
def _discriminator_too_weak(curves: Curves) -> str | None:
    """After 200 steps, logits that do not tell real from fake, or call fakes the more real ones."""
    found = _adversarial(curves)
    if found is None or curves.steps - int(curves.arguments.get("disc_start") or 0) < 200:
        return None
    loss, real, fake = found
    guessing = 0.69 if curves.arguments.get("disc_loss") == "vanilla" else 1.0
    if real - fake >= 0.05 or loss < 0.95 * guessing:
        return None
    return f"the discriminator does not tell real ({real:.3f}) from fake ({fake:.3f}); its loss is {loss:.2f}"


@_sickness(
    "dead codes",
    needs=("codebook/dead",),
    remedy="Start from a trained codebook, train with larger batches or a smaller --learning_rate, or take fewer "
    "vectors (num_vq_embeddings of --model_config).",
)
def _dead_codes(curves: Curves) -> str | None:
    """More vectors that nothing uses than are used in effect."""
    dead, used = curves.last("codebook/dead"), curves.late("codebook/perplexity")
    if used is None or dead <= used:
        return None
    return f"{dead:.0f} vectors have gone unused (codebook/dead), and {used:.0f} are in use (codebook/perplexity)"


@_sickness(
    "weights that do not move",
    needs=("learning_rate",),
    remedy="Check --learning_rate and --lr_warmup_steps, and that what is trained is not frozen and is reached by a "
    "loss whose weight is not 0.",
)
def _weights_do_not_move(curves: Curves) -> str | None:
    """No rate, no gradient, or an average that the weights have not left."""
    norms = [name for name in curves.channels("gradient_norm") if curves.late(name) == 0]
    if norms:
        return f"{norms[0]} is 0: no gradient reaches it"
    if "learning_rate" in curves and max(rate for _, rate in curves["learning_rate"]) == 0:
        return "learning_rate is 0 in every step"
    still = [name for name in curves.channels("ema_distance") if not any(value for _, value in curves[name])]
    return f"{still[0]} is 0 in every step: the weights are where they began" if still else None


@_sickness(
    "skipped steps",
    needs=("nonfinite_steps",),
    remedy="Lower --learning_rate, set --max_grad_norm, and look for broken images.",
)
def _steps_are_skipped(curves: Curves) -> str | None:
    """NaN or infinite gradients in more than a hundredth of the steps."""
    skipped = curves.last("nonfinite_steps")
    if skipped <= 0.01 * curves.steps:
        return None
    return f"{skipped:.0f} of {curves.steps} steps had NaN or infinite gradients (nonfinite_steps)"


@_sickness(
    "divergence",
    needs=("learning_rate",),
    remedy="Go back to a checkpoint before; lower --learning_rate, lengthen --lr_warmup_steps, set --max_grad_norm.",
)
def _diverges(curves: Curves) -> str | None:
    """A loss that ends at twice its lowest quarter, and above the first."""
    name = next((each for each in ("loss/nll", "loss") if each in curves), "")
    edges = [round(curves.steps * share) for share in (0, 0.25, 0.5, 0.75)]
    means = [curves.mean(name, *span) for span in zip(edges, [*edges[1:], curves.steps + 1], strict=True)]
    known = [mean for mean in means if mean is not None]
    if len(known) < 4 or min(known) <= 0 or known[-1] < 2 * min(known) or known[-1] <= known[0]:
        return None
    return f"{name} is {known[-1]:.3g} in the last quarter, and was {min(known):.3g}"


@_sickness(
    "moving average too slow",
    needs=("learning_rate",),
    remedy="Lower --ema_decay so that 3 / (1 - ema_decay) steps fit into the run, or take the weights themselves: "
    "eqvae export RUN DESTINATION --weights model.",
)
def _average_too_slow(curves: Curves) -> str | None:
    """A moving average that is mostly the weights it started from."""
    decay = curves.arguments.get("ema_decay")
    if decay is None or not curves.arguments.get("use_ema", True) or not curves.channels("ema_distance"):
        return None
    steps = max(curves.steps, int(curves.arguments.get("max_train_steps") or 0))
    kept = float(decay) ** steps
    if kept <= 0.5:
        return None
    return f"with ema_decay {decay:g}, {kept:.0%} of the average after {steps} steps are the weights it started from"


@_sickness(
    "overfitting",
    needs=("validation/psnr",),
    remedy="Take the checkpoint of the best validation (eqvae export), train for fewer steps, or on more images.",
)
def _overfitting(curves: Curves) -> str | None:
    """Validation half a decibel below its best, while the training loss went on falling. The start does not count."""
    validated = [each for each in curves["validation/psnr"] if each[0] > 0]
    if len(validated) < FEWEST:
        return None
    step, best = max(validated, key=lambda each: each[1])
    last = validated[-1][1]
    before, after = (
        curves.mean("loss/reconstruction", *span)
        for span in ((step // 2, step + 1), ((step + curves.steps) // 2, curves.steps + 1))
    )
    if step in (validated[0][0], validated[-1][0]) or last > best - 0.5 or before is None or after is None:
        return None
    if after >= 0.98 * before:
        return None
    return (
        f"validation/psnr fell from {best:.2f} dB at step {step} to {last:.2f} dB, while loss/reconstruction fell "
        f"from {before:.3g} to {after:.3g}"
    )


@_sickness(
    "equivariance not learned",
    needs=("validation/equivariance_scale_centred",),
    remedy="Train longer, raise --p_equivariance or --learning_rate, and look at --ema_decay, which may be too slow.",
)
def _equivariance_not_learned(curves: Curves) -> str | None:
    """An equivariance error that stayed within a twentieth of the first, though it was trained for."""
    if not {"equivariance", "explicit", "scale_only"} & set(curves.arguments.get("regularizers") or ()):
        return None
    for kind in ("rotation", "scale"):
        name = f"validation/equivariance_{kind}_centred"
        asked = kind != "rotation" or curves.arguments.get("tau_rotation", True)
        if kind == "scale" and curves.arguments.get("tau_scale") == "none":
            asked = False
        if asked and len(curves[name]) >= FEWEST and curves.last(name) >= 0.95 * curves.first(name):
            return f"the {kind} error is {curves.last(name):.2f}, and was {curves.first(name):.2f} ({name})"
    return None


class Finding(NamedTuple):
    """A symptom that was found, the figures that say so, and what to do."""

    symptom: str
    evidence: str
    remedy: str


def diagnose(curves: Curves) -> tuple[list[Finding], list[str]]:
    """What is wrong, and the symptoms that were not looked for since their curves are not there."""
    findings, unseen = [], []
    for rule in RULES:
        if not all(name in curves for name in rule.needs):
            unseen.append(rule.symptom)
        elif evidence := rule.look(curves):
            findings.append(Finding(rule.symptom, evidence, rule.remedy))
    return findings, unseen


def read_curves(run: Path) -> Curves:
    """The curves and arguments of a run's directory; a line that is being written is left out.

    Raises:
        ValueError: there is no metrics.jsonl, or nothing in it.
    """
    path = run / METRICS_FILE
    if not path.is_file():
        raise ValueError(f"{run} holds no {METRICS_FILE}, which a training run writes; name the directory of a run.")
    records = []
    for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), 1):
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            continue
        if not isinstance(record, dict) or not all(map(_is_figure, record.values())):
            raise ValueError(
                f"Line {number} of {path} is not a training run's, names with numbers; name the directory of one."
            )
        records.append(record)
    if not records:
        raise ValueError(
            f"{path} is empty: the run has logged nothing yet (its first line comes after logging_steps)."
        )
    resolved = run / RESOLVED_ARGUMENTS
    arguments: Any = (yaml.safe_load(resolved.read_text()) if resolved.is_file() else None) or {}
    if not isinstance(arguments, dict):
        raise ValueError(f"{resolved} does not hold options by name, as a training run writes them; remove it.")
    return Curves([record for record in records if math.isfinite(record.get("step", math.nan))], arguments)


def _is_figure(value: Any) -> bool:
    return value is None or (isinstance(value, int | float) and not isinstance(value, bool))
