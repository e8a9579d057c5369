"""Where a prior comes from (a file, regrad itself, a seeded start), and the settings of a bank under it.

Knows the learning half by the prior and its codec; opens no bank.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from regrad_cli.errors import Damaged, Mismatch, UsageProblem
from regrad_cli.fingerprints import Fingerprint, fingerprint, fingerprint_embedder
from regrad_cli.models import ModelFolder, quiet_libraries
from regrad_cli.records import BankSettings, CodecSettings, sha256_hex

if TYPE_CHECKING:
    from regrad_cli.learn.prior import Prior

SHIPPED = "shipped"  # in a prior's place: the one that comes with regrad for this model
AUTO = "auto"  # in a codec's place: the one that the prior was learned through
CODEC = "r1-int4"  # where it was learned through none


def new_settings(
    *,
    model: ModelFolder,
    embedder: ModelFolder,
    prior_file: Path | None,
    codec: str,
    chunk_tokens: int,
    chunk_overlap: int,
    keep_text: bool,
    seed: int,
) -> tuple[BankSettings, bytes, str | None]:
    """The settings of a new bank, its prior's bytes, and what is to be said of them. Without a prior file, the model's
    own that comes with regrad, else a seeded start that has learned nothing.

    codec   "auto" for the one that the prior was learned through
    raises  Mismatch where the prior was trained for another model; Damaged where the file is no prior; UsageProblem
            where it is a fine-tuned baseline
    """
    from regrad_cli.embed import load_embedder
    from regrad_cli.learn.codec import parse_codec

    quiet_libraries()
    if codec != AUTO:
        parse_codec(codec)  # before the slow part
    _refuse_too_long(model, chunk_tokens)
    identity = fingerprint(model.path)
    prior = prior_for(model, identity, prior_file, seed=seed)
    refuse_baseline(prior)
    codec_settings = parse_codec(chosen_codec(prior, codec))
    dimension = load_embedder(embedder.path, device="cpu").dimension
    fields, data = _fields_of(prior, codec_settings, dimension)
    settings = BankSettings(
        model=identity.model,
        model_name=model.name,
        tokenizer=identity.tokenizer,
        codec=codec_settings,
        embedder=fingerprint_embedder(embedder.path),
        embedder_name=embedder.name,
        embedding_dim=dimension,
        chunk_tokens=chunk_tokens,
        chunk_overlap=chunk_overlap,
        keep_text=keep_text,
        **fields,
    )
    return settings, data, worse_under(prior, codec_settings)


def chosen_codec(prior: Prior, asked: str) -> str:
    """The codec's name, where AUTO may be asked for."""
    return (prior.codec or CODEC) if asked == AUTO else asked


def worse_under(prior: Prior, codec: CodecSettings) -> str | None:
    """What is to be said where gradients of this prior are to be stored under that codec."""
    if prior.codec in (None, str(codec)):
        return None
    assert prior.codec is not None
    own, other = prior.f1_under(prior.codec), prior.f1_under(str(codec))
    worse = "its gradients may answer worse" if own is None or other is None else f"F1 is {other:g} instead of {own:g}"
    return f"the prior was learned through the codec {prior.codec}: under {codec} {worse}"


def settings_under(settings: BankSettings, prior_file: Path) -> tuple[BankSettings, bytes]:
    """A bank's settings as they are under another prior, and that prior's bytes. Where it was learned through a codec,
    the gradients are stored under that one.

    prior_file  "shipped" for the one that comes with regrad for the bank's model
    raises      Mismatch where the prior was trained for another model; Damaged where the file is no prior;
                UsageProblem where there is none, or a fine-tuned baseline
    """
    from regrad_cli.learn.codec import parse_codec
    from regrad_cli.learn.prior import Prior

    quiet_libraries()
    if str(prior_file) == SHIPPED:
        shipped = shipped_prior(Fingerprint(settings.model, settings.tokenizer))
        if shipped is None:
            raise UsageProblem(f"no prior of {settings.model_name} comes with regrad", "name a file: --prior FILE")
        prior = Prior.from_bytes(shipped, "the prior that comes with regrad")
    else:
        prior = _read_prior(prior_file, settings.model_name, settings.model)
    refuse_baseline(prior)
    codec = settings.codec if prior.codec is None else parse_codec(prior.codec)
    fields, data = _fields_of(prior, codec, settings.embedding_dim)
    return replace(settings, codec=codec, **fields), data


def _fields_of(prior: Prior, codec: CodecSettings, dimension: int) -> tuple[dict[str, Any], bytes]:
    """The fields of a bank's settings that a prior decides, and its bytes as the bank keeps them."""
    from regrad_cli.learn.rows import widths

    data = prior.to_bytes()
    code_bytes, scale_count = widths(codec, prior.shapes, prior.segments, dimension)
    fields = {
        "prior": sha256_hex(data),
        "prior_name": str(prior.card["name"]),
        "prior_trained": prior.trained,
        "tensors": prior.shapes,
        "code_bytes": code_bytes,
        "scale_count": scale_count,
        "segments": prior.segments,
    }
    return fields, data


def shipped_prior(identity: Fingerprint) -> bytes | None:
    """The prior that comes with regrad for this very model, named by its fingerprint; None for any other."""
    file = files("regrad_cli") / "data" / f"prior-{identity.model[:16]}.safetensors"
    return file.read_bytes() if file.is_file() else None


def same_prior(settings: BankSettings, file: Path | None) -> Iterator[bytes]:
    """What may be the prior of a bank with these settings, which lost it: this file and the one that comes with regrad,
    as they lie there and as a bank keeps them. The bank knows it by its hash.

    raises  UsageProblem if the file cannot be read
    """
    found = [shipped_prior(Fingerprint(settings.model, settings.tokenizer))]
    if file is not None:
        try:
            found.insert(0, file.read_bytes())
        except OSError as error:
            raise UsageProblem(f"the prior {file} cannot be read: {error.strerror}") from None
    for data in found:
        if data is not None:
            yield data
            from regrad_cli.learn.prior import Prior  # torch: not where these bytes were it

            with suppress(Damaged):
                yield Prior.from_bytes(data).to_bytes()


def prior_for(model: ModelFolder, identity: Fingerprint, file: Path | None, *, seed: int) -> Prior:
    """The prior in this file; without one, the model's own that comes with regrad; without that, a seeded start.

    raises  Mismatch where the prior was trained for another model; Damaged where the file is no prior
    """
    from regrad_cli.learn.prior import Prior

    if file is not None:
        return _read_prior(file, model.name, identity.model)
    shipped = shipped_prior(identity)
    if shipped is not None:
        return Prior.from_bytes(shipped, "the prior that comes with regrad")
    from regrad_cli.learn.model import load_model
    from regrad_cli.learn.prior import seeded_prior
    from regrad_cli.learn.steps import with_found_step_size

    # In fp32 on the CPU whatever will compute later, so that one seed is one prior on every machine.
    loaded = load_model(model.path, device="cpu", dtype="fp32")
    return with_found_step_size(loaded, seeded_prior(loaded, identity.model, seed=seed))


def refuse_baseline(prior: Prior) -> None:
    """raises UsageProblem where it was tuned for something else than to take gradients"""
    objective = prior.card.get("objective", "regrad")
    if objective != "regrad":
        raise UsageProblem(
            f"the prior '{prior.card['name']}' was tuned for {objective}, not to take gradients",
            "it is a baseline for `regrad eval --baseline`; --prior takes what `regrad meta-train` learns unasked",
        )


def _refuse_too_long(model: ModelFolder, chunk_tokens: int) -> None:
    """raises UsageProblem where a passage could be longer than the model's positions"""
    import json

    try:
        config = json.loads((model.path / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return  # loading the model says what is wrong with it
    config = config.get("text_config") or config
    positions = config.get("max_position_embeddings") or config.get("n_positions")
    if isinstance(positions, int) and chunk_tokens > positions:
        raise UsageProblem(
            f"passages of {chunk_tokens} tokens do not fit: {model.name} has {positions} positions",
            f"use --chunk-tokens of {positions} at most",
        )


def _read_prior(file: Path, model_name: str, model: str) -> Prior:
    """The prior in a file; `model` is the fingerprint of the model that it must be of."""
    from regrad_cli.learn.prior import Prior

    try:
        data = file.read_bytes()
    except OSError as error:
        raise UsageProblem(f"the prior {file} cannot be read: {error.strerror}") from None
    prior = Prior.from_bytes(data, str(file))
    if prior.card.get("model") != model:
        raise Mismatch(
            f"the prior {file} was trained for model {str(prior.card.get('model'))[:12]}…, "
            f"and {model_name} is {model[:12]}…",
            "use the model that it was trained for, or a prior of this one",
        )
    return prior
