"""The options that several commands share, written once."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

from uipe_merge.checkpoint.decisions import Decision
from uipe_merge.mergekit_recipe import Method
from uipe_merge.recipe import Form, Rounding
from uipe_merge.steering import Control, Granularity

Original = Annotated[
    str,
    typer.Argument(
        metavar="ORIGINAL",
        help="The original checkpoint θ₀: a directory, URL or ORG/NAME@REVISION.",
    ),
]
Unlearned = Annotated[
    str,
    typer.Argument(
        metavar="UNLEARNED", help="The unlearned checkpoint θᵤ, likewise; or an adapter."
    ),
]
OriginalOrConfig = Annotated[
    str,
    typer.Argument(
        metavar="ORIGINAL",
        help="The original checkpoint θ₀: a directory, URL or ORG/NAME@REVISION. "
        "Or, alone, a recipe of mergekit's: CONFIG.yml.",
    ),
]
UnlearnedIfAny = Annotated[
    str | None,
    typer.Argument(
        metavar="UNLEARNED",
        help="The unlearned checkpoint θᵤ, likewise; or an adapter.",
        show_default=False,
    ),
]
OutputPath = Annotated[str, typer.Option("--output", "-o", help="Directory or URL to make.")]
OutputIfAny = Annotated[
    str | None, typer.Option("--output", "-o", help="Directory or URL to make.  [required]")
]
Alpha = Annotated[
    float | None,
    typer.Option("--alpha", "-a", help="α: 0 is the unlearned model, −1 the original, 2 adds 2·v."),
]
AlphaRule = Annotated[
    list[str] | None,
    typer.Option(
        metavar="PATTERN=ALPHA", help="α of the tensors that match; the first rule decides."
    ),
]
AlphaLayers = Annotated[
    str | None,
    typer.Option(metavar="LAYER=ALPHA,…", help="α by layer, linear between: 0=0,16=2,31=1."),
]
AlphaGradient = Annotated[
    str | None,
    typer.Option(metavar="ALPHA,…", help="α spread from the first layer to the last."),
]
Recipe = Annotated[
    str | None,
    typer.Option(metavar="FILE", help="All of it in a YAML, TOML or JSON file instead."),
]
PrintRecipe = Annotated[
    bool, typer.Option("--print-recipe", help="Print the recipe as YAML and end.")
]
PrintMergekit = Annotated[
    bool,
    typer.Option(
        "--print-mergekit", help="Print a recipe of mergekit's for the same merge, and end."
    ),
]
MergekitMethod = Annotated[
    Method, typer.Option(help="Of that recipe; uipe keeps every bit and needs uipe-merge mergekit.")
]
Dtype = Annotated[
    str, typer.Option(help="auto keeps each tensor's; or float32, bfloat16, float16.")
]
MaxShardSize = Annotated[
    str | None,
    typer.Option(help="Such as 5GB. [default: the unlearned checkpoint's own shards]"),
]
OnMismatch = Annotated[
    Decision,
    typer.Option(help="Tensors that one side lacks or has in another shape."),
]
As = Annotated[
    Form, typer.Option("--as", help="model; or adapter, for a LoRA adapter as UNLEARNED.")
]
RoundingOption = Annotated[
    Rounding, typer.Option(help="stochastic keeps small steps in 16 bits, on average.")
]
Along = Annotated[
    list[str] | None,
    typer.Option(
        metavar="UPDATE",
        help="A related update, NEW or NEW@@OLD: α is multiplied by its projection on v.",
    ),
]
MinCos = Annotated[
    float, typer.Option(help="Related updates of a smaller cosine with v count nothing.")
]
MaxAlpha = Annotated[float, typer.Option(help="The most that related updates multiply α by.")]
AwayFrom = Annotated[
    str | None,
    typer.Option(metavar="UPDATE|original", help="A protected update that the step must not undo."),
]
Always = Annotated[
    bool, typer.Option("--always", help="Keep off it even where the step does not undo it.")
]
Rank = Annotated[
    int | None, typer.Option(help="Amplify only so many singular directions of each matrix.")
]
Energy = Annotated[
    float | None, typer.Option(help="As many as hold this share of a matrix's ‖v‖².")
]
RankAll = Annotated[bool, typer.Option("--rank-all", help="Embeddings and head too.")]
ControlOption = Annotated[
    Control, typer.Option(help="random takes a random step of the same norm instead.")
]
GranularityOption = Annotated[Granularity, typer.Option(help="Over what inner products are taken.")]
Add = Annotated[
    list[str] | None,
    typer.Option(metavar="UPDATE=BETA", help="A further update times β; repeatable."),
]
Seed = Annotated[
    int, typer.Option(help="Of stochastic rounding, of --control, --rank and --energy.")
]
Device = Annotated[
    str, typer.Option(help="Where --rank and --energy find singular vectors: cpu or cuda.")
]
Threads = Annotated[
    int | None,
    typer.Option(min=1, max=256, help="Threads, or Ray workers. [default: two a core, at most 8]"),
]
ExecutorOption = Annotated[
    Literal["threads", "ray"],
    typer.Option("--executor", help="On what it runs: threads here, or a Ray cluster's workers."),
]
RayAddress = Annotated[
    str | None,
    typer.Option(
        metavar="HOST:PORT", help="The cluster, or auto: this node's. [default: RAY_ADDRESS]"
    ),
]
SliceOption = Annotated[
    str | None,
    typer.Option(
        "--slice", metavar="I/N", help="Make one of N shares of the shards; the last publishes."
    ),
]
Overwrite = Annotated[
    bool, typer.Option("--overwrite", help="Replace a model written by uipe-merge.")
]
AllowPickle = Annotated[
    bool,
    typer.Option("--allow-pickle", help="Read pytorch_model*.bin; nothing in it is run."),
]
Dequantize = Annotated[
    bool,
    typer.Option("--dequantize", help="Take block-scaled FP8; the output is not quantised."),
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print the plan; write nothing.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print errors only.")]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="Print every tensor.")]
