"""``uipe`` as a merge method of mergekit's (extra ``mergekit``), and mergekit's own command with it.

θ₀ + Σ (1 + αᵢ)·vᵢ over the models besides the base, vᵢ = θᵢ − θ₀: the extrapolation of one update
(UIPE, arXiv 2503.04693), and of several the sum that task arithmetic makes of them (arXiv 2212.04089).
"""
# No `from __future__ import annotations`: mergekit reads the annotations of the method as objects.

from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version

from uipe_merge.errors import UsageError

_REMEDY = "pip install 'uipe-merge[mergekit]'"
_URL = "https://arxiv.org/abs/2503.04693"


def register() -> None:
    """Make ``uipe`` known to mergekit; a second call does nothing.

    Raises:
        UsageError: mergekit is not installed, or has another interface than that of 0.1.5.
    """
    try:
        import torch
        from mergekit.merge_methods import registered_methods
        from mergekit.merge_methods.base import BasePolicy, InputContract, PerNonBase, TensorGroup
        from mergekit.merge_methods.easy_define import merge_method
        from mergekit.merge_methods.registry import register as make_known
    except ImportError as error:
        raise _missing(error) from None
    if any(method.spec.name == "uipe" for method in registered_methods()):
        return
    from uipe_merge.arithmetic.whole import extrapolate_whole

    @merge_method(  # type: ignore[untyped-decorator]  # mergekit is not followed
        name="uipe",
        pretty_name="UIPE",
        reference_url=_URL,
        contract=InputContract(base=BasePolicy.REQUIRED, min_non_base=1),
    )
    def uipe(group: TensorGroup, alpha: PerNonBase[float]) -> torch.Tensor:
        assert group.base is not None  # noqa: S101 - the contract asks for one
        models = [entry.tensor for entry in group.non_base]
        return extrapolate_whole(group.base.tensor, models, alpha.values_for(group.non_base))

    make_known(uipe)


def program() -> Callable[[Sequence[str]], None]:
    """Return ``mergekit-yaml`` with ``uipe`` among its methods; called with its arguments, it runs.

    Then it prints what it prints, and raises ``click.ClickException`` where the arguments make no
    sense and whatever else it fails with.

    Raises:
        UsageError: As for ``register``.
    """
    register()
    from mergekit.scripts.run_yaml import main

    def run(arguments: Sequence[str]) -> None:
        main.main(list(arguments), prog_name="uipe-merge mergekit", standalone_mode=False)

    return run


def _missing(error: ImportError) -> UsageError:
    try:
        found = version("mergekit")
    except PackageNotFoundError:
        return UsageError("mergekit is not installed", remedy=_REMEDY)
    return UsageError(
        f"mergekit {found} has another interface than that of 0.1.5: {error}", remedy=_REMEDY
    )
