"""Routers on their own: extract them from a routed checkpoint, join them with their base model, push them to the Hub.

python -m drllm.router_checkpoint extract CHECKPOINT --output_dir ROUTERS
python -m drllm.router_checkpoint join ROUTERS [--base NAME_OR_PATH] --output_dir CHECKPOINT
python -m drllm.router_checkpoint push ROUTERS --repo_id USER/NAME
"""

from __future__ import annotations

import argparse

from drllm.arguments import add_shared
from drllm.checkpoints import join_routers
from drllm.errors import main_guard
from drllm.saving import extract_routers, join_to_folder, push_routers

__all__ = ["join_routers", "main"]  # model cards import join_routers from here


@main_guard
def main(argv: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m drllm.router_checkpoint", description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    sub = commands.add_parser("extract", help="write the routers of a routed checkpoint on their own")
    sub.add_argument("checkpoint", help="folder of a routed checkpoint")
    sub.add_argument("--output_dir", required=True, help="folder for the routers")
    sub = commands.add_parser("join", help="routers + base model -> routed checkpoint")
    sub.add_argument("routers", help="folder or Hub name of a router checkpoint")
    sub.add_argument("--base", help="folder or Hub name of the base model (default: the one the routers name)")
    add_shared(sub, "revision")
    add_shared(sub, "dtype", says="that of the routers")
    sub.add_argument("--output_dir", required=True, help="folder for the routed checkpoint")
    sub = commands.add_parser("push", help="upload routers to the Hub")
    sub.add_argument("routers", help="folder of a router checkpoint")
    sub.add_argument("--repo_id", required=True, help="USER/NAME on the Hub")
    sub.add_argument("--private", action="store_true", help="create a private repository")
    args = parser.parse_args(argv)
    if args.command == "extract":
        print(f"wrote {extract_routers(args.checkpoint, args.output_dir)}")
    elif args.command == "join":
        print(f"wrote {join_to_folder(args.routers, args.output_dir, args.base, args.revision, args.dtype)}")
    else:
        print(push_routers(args.routers, args.repo_id, args.private))


if __name__ == "__main__":
    raise SystemExit(main())
