"""`python -m hpctrain prepare CONFIG`: what a run of a config would fetch, in one process."""

from __future__ import annotations

from collections.abc import Sequence

from hpctrain.config import Config
from hpctrain.config.data_rules import names_object
from hpctrain.training.build import make_model, resolve_components
from hpctrain.training.data.user_data import built_object
from hpctrain.training.prepare_data import prepare_alone


def fetch(config: Config, path: str, overrides: Sequence[str]) -> list[str]:
    """Make the model and its data, have them fetch what they need, and train nothing.

    Args:
        config: names them.
        path: of its file.
        overrides: that it was read with.

    Returns:
        What was made, in words.

    Raises:
        ConfigError: if it cannot be made.
        DatasetError: if there is no internet here.
    """
    section = config.data
    made: list[tuple[str, object]] = []
    if section.use is not None:
        made.append(("data", built_object("data.use", section.use, section.arguments)))
    for name, reference, arguments in (
        ("data.train", section.train, section.train_arguments),
        ("data.validation", section.validation, section.validation_arguments),
        ("data.test", section.test, {}),
    ):
        if reference is not None and names_object(reference):
            made.append((name, built_object(name, reference, arguments)))
    # Models that begin with weights of others download them as they are made.
    model = make_model(config, resolve_components(config, path, overrides))
    made.append(("model", model))
    prepare_alone(each for _, each in made if each is not None)
    return [f"{name}: {type(each).__name__}" for name, each in made]
