"""``uipe`` as a merge method of mergekit's (extra ``mergekit``), and mergekit's own command with it.

θ₀ + Σ (1 + αᵢ)·vᵢ over the models besides the base, vᵢ = θᵢ − θ₀: the extrapolation of one update
(UIPE, arXiv 2503.04693), and of several the sum that task arithmetic makes of them (arXiv 2212.04089).
"""
# No `from __future__ import annotations`: mergekit reads the annotations of the method as objects.

import sys
import traceback
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version

from uipe_merge.errors import UsageError

_REMEDY = "pip install 'uipe-merge[mergekit]'"
_URL = "https://arxiv.org/abs/2503.04693"
_FAILED = 1


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


def run(arguments: Sequence[str]) -> int:
    """Run ``mergekit-yaml`` with ``uipe`` among its methods, in this process; return an exit code.

    What it prints is its own. It leaves with 2 where the command line makes no sense, and with 1
    and its traceback where it failed.

    Raises:
        UsageError: As for ``register``.
    """
    register()
    import click
    from mergekit.scripts.run_yaml import main

    try:
        main.main(list(arguments), prog_name="uipe-merge mergekit", standalone_mode=False)
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except Exception as error:  # noqa: BLE001 - whatever another program fails with
        traceback.print_exc()
        kind = type(error).__name__
        sys.stderr.write(f"error: mergekit failed with {kind}; the lines above are its own\n")
        return _FAILED
    return 0


def _missing(error: ImportError) -> UsageError:
    try:
        found = version("mergekit")
    except PackageNotFoundError:
        return UsageError("mergekit is not installed", remedy=_REMEDY)
    return UsageError(
        f"mergekit {found} has another interface than that of 0.1.5: {error}", remedy=_REMEDY
    )
