"""`specdec train`: from the name of a target to a head that `specdec generate --draft` serves."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from specdec.errors import SpecdecError

EXAMPLES = """\
examples:
  specdec train --target smollm2-135m --prompts prompts.jsonl --out my-head
  specdec train --prompts prompts.jsonl --out my-head --recipe gpu optimizer.lr=5e-4 unroll.steps=5
  specdec train --prompts my-domain.jsonl --out my-head head.start=shipped
  specdec train --prompts prompts.jsonl --out my-head --dry-run
  specdec train --prompts prompts.jsonl --out my-head --endpoint http://localhost:8000/v1

The target answers the prompts, and the head learns from these answers. Recipe cpu takes about 40 minutes on two cores.
A run that was interrupted goes on when the same command is given again. The output directory is a raw EAGLE-3
checkpoint with a model card, the recipe, a log and a plot. What raises tau stands in training/README.md."""


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.epilog = EXAMPLES
    parser.add_argument("--target", default="smollm2-135m", help="name, directory, .gguf file or Hub id")
    parser.add_argument(
        "--prompts",
        default=None,
        metavar="FILE",
        help="what to answer: jsonl, parquet or a datasets id (default: the recipe's)",
    )
    parser.add_argument(
        "--out", type=Path, required=True, help="directory of the head and, below it, of the run"
    )
    parser.add_argument("--recipe", default="cpu", help="cpu, gpu, large or a YAML file (default: cpu)")
    parser.add_argument(
        "overrides", nargs="*", metavar="section.field=value", help="change a choice of the recipe"
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="print plan, sizes, time and memory; do nothing"
    )
    parser.add_argument(
        "--max-minutes", type=float, default=None, help="of training, answers not counted; stops cleanly"
    )
    parser.add_argument("--no-resume", action="store_true", help="refuse a directory that holds a run")
    parser.add_argument(
        "--endpoint",
        default=None,
        metavar="URL",
        help="let this OpenAI-compatible server answer (its key: SPECDEC_API_KEY or OPENAI_API_KEY)",
    )
    parser.add_argument(
        "--feature-cache-gb",
        type=float,
        default=None,
        help="disk for the target's states between epochs (recipe cpu: 8)",
    )
    parser.add_argument(
        "--push-to-hub", default=None, metavar="ORG/NAME", help="upload the finished head, without the run"
    )


def run(args: argparse.Namespace) -> int:
    if args.push_to_hub is not None:
        _check_repository(args.push_to_hub)
    try:
        from training.run import Order, train
    except ImportError as error:
        raise SpecdecError(
            f"needs packages that are not installed ({error.name})",
            field="train",
            remedy="pip install 'specdec[train]'",
        ) from error
    order = Order(
        target=args.target,
        prompts=args.prompts,
        out=args.out,
        recipe=args.recipe,
        overrides=_overrides(args),
        endpoint=args.endpoint,
        resume=not args.no_resume,
        dry_run=args.dry_run,
    )
    out = train(order)
    if out is not None and args.push_to_hub and _alone_or_first():
        _push(out, args.push_to_hub)
    return 0


def _overrides(args: argparse.Namespace) -> list[str]:
    extra = list(args.overrides)
    if args.max_minutes is not None:
        extra.append(f"trainer.max_minutes={args.max_minutes}")
    if args.feature_cache_gb is not None:
        extra.append(f"cache.gigabytes={args.feature_cache_gb}")
    return extra


def _check_repository(name: str) -> None:
    """Before hours of training. Raises SpecdecError for what cannot be the name of a repository."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]  # public, but not re-exported

    try:
        validate_repo_id(name)
    except HFValidationError:
        raise SpecdecError("is no name of a repository", field="push_to_hub", value=name,
                           allowed="ORG/NAME of letters, digits, -, _ and .") from None  # fmt: skip


def _alone_or_first() -> bool:
    """Of the processes of a launch, one pushes."""
    from accelerate import PartialState

    return bool(PartialState().is_main_process)


def _push(directory: Path, repository: str) -> None:
    """Upload the head; not the run's folder, which holds the answers (perhaps private), features and optimiser."""
    from huggingface_hub import HfApi

    from training.run import RUN

    kept_here = f"{RUN}/*"
    try:
        api = HfApi()
        api.create_repo(repository, exist_ok=True)
        api.upload_folder(folder_path=directory, repo_id=repository, ignore_patterns=[kept_here])
    except Exception as error:  # the Hub's share no base across versions; the head is finished in any case
        said = str(error).splitlines() or [type(error).__name__]
        again = f"The head is in {directory}. Try again: hf upload {repository} {directory} . --exclude '{kept_here}'"
        raise SpecdecError(f"the head was not pushed: {said[0]}", field="push_to_hub", value=repository,
                           remedy=again) from error  # fmt: skip
    sys.stderr.write(f"pushed to {repository}\n")
