"""`specdec serve`: an OpenAI-compatible server on a target and its drafter."""

from __future__ import annotations

import argparse
import os
import sys

from specdec.cli.options import add_model
from specdec.errors import SpecdecError, UnsupportedError

KEY_VARIABLE = "SPECDEC_API_KEY"
MOST_SLOTS = 8  # that run at once unasked
EXAMPLES = f"""\
examples:
  specdec serve
  specdec serve ./my-model --draft ./my-head --host 0.0.0.0 --api-key SECRET
  specdec serve --plain --port 8001
  curl localhost:8000/v1/completions -H 'Content-Type: application/json' -d '{{"prompt": "Once", "max_tokens": 20}}'

The page at / chats with the model; /metrics speaks vLLM's names. SIGTERM finishes what runs, then ends.
${KEY_VARIABLE} is an --api-key that process lists do not show."""


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.epilog = EXAMPLES
    add_model(parser)
    parser.add_argument(
        "--host", default="127.0.0.1", help="address to listen on (default: this machine alone)"
    )
    parser.add_argument(
        "--port", type=int, default=8000, help="to listen on; 0 takes a free one (default: 8000)"
    )
    parser.add_argument("--plain", action="store_true", help="the baseline: no drafting")
    parser.add_argument(
        "--slots",
        type=int,
        default=None,
        help=f"requests that run at once (default: what fits, at most {MOST_SLOTS})",
    )
    parser.add_argument(
        "--queue", type=int, default=256, help="requests that may wait beyond them (default: 256)"
    )
    key = os.environ.get(KEY_VARIABLE, "").strip() or None
    parser.add_argument("--api-key", default=key, type=str.strip, help="ask for this key under /v1/")
    parser.add_argument(
        "--burst",
        action="store_true",
        help="stream what a round accepted at once; by default tokens leave evenly, two or three rounds later",
    )
    parser.add_argument(
        "--served-model-name",
        default=None,
        metavar="NAME",
        help="what clients call the model (default: TARGET)",
    )
    parser.add_argument(
        "--request-timeout",
        type=float,
        default=600.0,
        metavar="SECONDS",
        help="for a whole answer, from its arrival; then 504 (default: 600)",
    )
    parser.add_argument(
        "--drain-timeout",
        type=float,
        default=60.0,
        metavar="SECONDS",
        help="for running answers after SIGTERM (default: 60)",
    )


def run(args: argparse.Namespace) -> int:
    from specdec.layers.linear import bound_kernel_caches

    bound_kernel_caches()
    try:
        from specdec.server.limits import ServerLimits
        from specdec.server.listen import bind, listen, make_server
        from specdec.server.state import ServerState
    except ModuleNotFoundError as error:
        raise UnsupportedError(
            f"needs a package that is missing: {error.name}", remedy="pip install 'specdec[serve]'"
        ) from None
    from specdec.cli.session import loading, options_of
    from specdec.generate import SpecDecoder

    if args.slots is not None and args.slots < 1:
        raise SpecdecError("is out of range", field="slots", value=args.slots, allowed="1 or more")
    if args.api_key == "":
        raise SpecdecError("is empty, which would let everyone in", field="api_key",
                           remedy="Leave --api-key out to ask for none.")  # fmt: skip
    limits = ServerLimits(
        queue=args.queue, request_seconds=args.request_timeout, drain_seconds=args.drain_timeout
    )
    listener = bind(args.host, args.port)
    with listener:
        options = options_of(args, slots=args.slots, most_slots=MOST_SLOTS)
        draft = "none" if args.plain else args.draft
        with loading(args):
            decoder = SpecDecoder.from_pretrained(args.target, draft, options)
        name = args.served_model_name or args.target
        state = ServerState(decoder, name, limits, api_key=args.api_key, burst=args.burst)
        engine = decoder.engine
        address = listen(listener)  # whoever reads it and comes at once waits instead of being refused
        print(  # noqa: T201 - the face speaks here
            f"{name} on {engine.target.info.device}, drafter {engine.drafter.name}, {engine.limits.slots} slots of "
            f"{engine.limits.length} tokens: {address}",
            file=sys.stderr,
            flush=True,
        )
        make_server(state, args.host, args.port).run(sockets=[listener])
    return 0 if state.worker.failure is None else 1
