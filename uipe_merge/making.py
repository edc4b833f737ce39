"""A model of transformers, made of tensors in memory and of the configuration ``merge`` writes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from uipe_merge.errors import IncompatibleModelsError, listed

if TYPE_CHECKING:
    from pathlib import Path

    import torch
    from transformers import PreTrainedModel

    from uipe_merge.job import Job


class Maker(NamedTuple):
    """What makes a model of tensors: a class of transformers with its arguments."""

    cls: Any
    config: Any
    generation: Any
    options: dict[str, object]

    def make(self, state: dict[str, torch.Tensor]) -> tuple[PreTrainedModel, set[str]]:
        """Return the model, and the buffers that the tensors say nothing of.

        Raises:
            IncompatibleModelsError: They do not fit, or a parameter is not among them.
        """
        try:
            model, said = self.cls.from_pretrained(
                None,
                config=self.config,
                state_dict=state,
                output_loading_info=True,
                dtype="auto",
                **self.options,
            )
        except (ValueError, RuntimeError) as error:
            raise _unmade(error) from error
        missing = set(said["missing_keys"])
        parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
        if lacking := sorted(missing & parameters):
            raise IncompatibleModelsError(
                f"the checkpoints lack parameters of {self.cls.__name__}: {listed(lacking)}",
                remedy="give the model_class that they were saved from",
            )
        if self.generation is not None:
            model.generation_config = self.generation
        return model, missing


def make_maker(
    model_class: Any,  # noqa: ANN401 - a class of transformers
    job: Job,
    directory: Path,
    options: dict[str, object],
) -> Maker:
    """Read the configuration that ``merge`` would write, and find the class that it names.

    Raises:
        IncompatibleModelsError: There is none, or transformers cannot make anything of it.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedModel

    from uipe_merge.finishing import config_edits
    from uipe_merge.output.filesystem import LocalFileSystem
    from uipe_merge.output.sidecars import Edits, copy_sidecar

    names, edits = ("config.json", "generation_config.json"), config_edits(job)
    sidecars = {each.name: each for each in job.sidecars if each.name in names}
    if names[0] not in sidecars:
        raise IncompatibleModelsError(
            "has no config.json, so nothing says what model it is", file=job.arguments[1]
        )
    for name, sidecar in sidecars.items():
        copy_sidecar(LocalFileSystem(), sidecar, directory, edits.get(name, Edits()))
    cls = model_class or AutoModelForCausalLM
    generation = None
    try:
        config = AutoConfig.from_pretrained(directory, trust_remote_code=False)
        if not issubclass(cls, PreTrainedModel):  # one of the Auto classes
            with torch.device("meta"):
                shape = cls.from_config(config, trust_remote_code=False)
            cls, config = type(shape), shape.config
        if names[1] in sidecars and "generation_config" not in options:
            generation = GenerationConfig.from_pretrained(directory)
    except (ValueError, OSError) as error:
        raise _unmade(error) from error
    return Maker(cls, config, generation, options)


def _unmade(error: Exception) -> IncompatibleModelsError:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return IncompatibleModelsError(f"transformers cannot make the model: {lines[0]}")
