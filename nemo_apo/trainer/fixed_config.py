"""What a resumed run may not change: all that decides what weights, memory and data mean."""

import dataclasses
import hashlib
import json
from collections.abc import Collection, Mapping
from typing import Any

from nemo_apo.config import ALLOWED_CHANGES, Config, vocab_size

VOCABULARY, PROMPTS, SEED = "task.vocab_size", "task.prompts_sha256", "run.seed"
# The weights themselves depend on these.
_NEVER = ("model.", VOCABULARY, SEED)
# Where only some keys of a section decide what data means; the others are limits.
_MEANING = {"grading": ("grader", "tolerance")}
# Where first weights, data and tokenizer are read from: what they are stands in the checkpoint, and
# the digest of the prompts says what the data is. What layers are made of stands in its manifest.
_PLACES = {
    "model": ("path", "transformer_impl"),
    "task": ("tokenizer", "chat_template", "path", "test_path"),
}


def fixed_values(config: Config) -> dict[str, Any]:
    """Every value that a checkpoint is tied to, by dotted key; plain JSON."""
    values = model_values(config) | _section_values(config, ALLOWED_CHANGES)
    values |= {PROMPTS: config.task.fingerprint(), SEED: config.run.seed}
    return _as_read(values)


def model_values(config: Config) -> dict[str, Any]:
    """Those that the weights alone are tied to."""
    values = _section_values(config, ("model",))
    return _as_read({**values, VOCABULARY: vocab_size(config)})


def model_changes(saved: Mapping[str, Any], config: Config) -> list[str]:
    """Changed values of the model and its vocabulary, each as "key was X and is now Y"."""
    wanted = model_values(config)
    of_model = {k: v for k, v in saved.items() if k.startswith("model.") or k == VOCABULARY}
    return changes(of_model, wanted, ())


def _section_values(config: Config, sections: Collection[str]) -> dict[str, Any]:
    return {
        f"{section}.{key}": value
        for section in sections
        for key, value in meaning(section, getattr(config, section)).items()
    }


def _as_read(values: Mapping[str, Any]) -> dict[str, Any]:
    """As they come back from a file: a tuple as a list."""
    return json.loads(json.dumps(values))


def meaning(section: str, settings: Any) -> dict[str, Any]:
    """The values of a section, a dataclass, without those that decide nothing that is learned."""
    values = dataclasses.asdict(settings)
    places = _PLACES.get(section, ())
    return {key: values[key] for key in _MEANING.get(section, values) if key not in places}


def fingerprint(values: Mapping[str, Any]) -> str:
    """SHA-256 of values, in hex."""
    text = json.dumps(values, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def changes(
    saved: Mapping[str, Any], wanted: Mapping[str, Any], allowed: Collection[str]
) -> list[str]:
    """Changed values that are not allowed, each as "key was X and is now Y"."""
    keys = [*saved, *(key for key in wanted if key not in saved)]
    return [
        f"{key} was {_shown(saved, key)} and is now {_shown(wanted, key)}"
        for key in keys
        if saved.get(key, None) != wanted.get(key, None)
        and (key.startswith(_NEVER) or key.split(".")[0] not in allowed)
    ]


def _shown(values: Mapping[str, Any], key: str) -> str:
    return json.dumps(values[key]) if key in values else "not set"
