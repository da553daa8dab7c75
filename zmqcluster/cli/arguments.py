"""The parser, made from the tables of verbs and of config keys."""

from __future__ import annotations

import argparse
import difflib
import sys
from collections.abc import Sequence
from typing import Any, Final, NoReturn

from zmqcluster.cli import act, crawl, serve, show, submit
from zmqcluster.cli.call import USAGE, Verb, Words
from zmqcluster.cli.output import encodable
from zmqcluster.config import KEYS, Key
from zmqcluster.config.kinds import ByteCount, Choice, ListOf, Seconds, Whole

PROGRAM: Final = "python main.py"
# Attributes of the parsed arguments that hold texts of config keys.
KEY_PREFIX: Final = "config_"

DISTRIBUTE_VERBS: Final = (*serve.VERBS, *show.VERBS, *submit.VERBS, *act.VERBS)

_METAVARS_BY_KEY: Final = {
    "master_host": "HOST",
    "data_dir": "DIR",
    "bind": "ADDRESS",
    "rest_bind": "ADDRESS",
    "device_id": "ID",
    "device_name": "NAME",
    "join_token": "TOKEN",
    "retention_days": "DAYS",
}
_METAVARS: Final = {Whole: "N", Seconds: "SECONDS", ByteCount: "BYTES", ListOf: "A,B"}
_KEYS: Final = {key.name: key for key in KEYS}


def build_parser() -> argparse.ArgumentParser:
    """The whole command line. Parsing sets `verb`, and `config_…` for each config flag given."""
    parser = _parser(
        PROGRAM,
        "A crawler cluster that needs no broker.",
        f"{PROGRAM} distribute standalone",
    )
    top = _subparsers(parser)
    distribute = _parser(
        f"{PROGRAM} distribute",
        "run the cluster, look at it, give it work",
        f"{PROGRAM} distribute status",
        into=top,
        name="distribute",
    )
    verbs = _subparsers(distribute)
    for verb in DISTRIBUTE_VERBS:
        _add_verb(verbs, verb, f"{PROGRAM} distribute")
    token = _parser(
        f"{PROGRAM} distribute token",
        "let other machines join",
        f"{PROGRAM} distribute token create",
        into=verbs,
        name="token",
    )
    token_verbs = _subparsers(token)
    for verb in act.TOKEN_VERBS:
        _add_verb(token_verbs, verb, f"{PROGRAM} distribute token", "distribute ")
    _add_verb(top, crawl.VERB, PROGRAM, "")
    return parser


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The checked arguments; wrong ones end the process with one line and exit code 2.

    Words of a list may stand on both sides of a flag (`submit echo --wait value=1`), which
    argparse alone refuses.
    """
    args, left = build_parser().parse_known_args(argv)
    parser: _Parser = args.parser
    words: Words | None = args.verb.words if args.verb else None
    if left and (words is None or any(map(_is_flag, left))):
        parser.refuse_unknown(next(filter(_is_flag, left), left[0]))
    if args.verb is None:
        parser.print_help(sys.stderr)
        parser.exit(USAGE)
    try:
        for each in left:
            assert words is not None
            getattr(args, words.into).append(words.read(each))
    except argparse.ArgumentTypeError as error:
        parser.error(str(error))
    return args


def config_flags(args: argparse.Namespace) -> dict[str, str]:
    """The config keys given as flags, as text; repeated lists joined by commas."""
    given = {
        name.removeprefix(KEY_PREFIX): value
        for name, value in vars(args).items()
        if name.startswith(KEY_PREFIX) and value is not None
    }
    return {
        name: ",".join(value) if isinstance(value, list) else value for name, value in given.items()
    }


class _Parser(argparse.ArgumentParser):
    """Says a mistake in one line, not behind a screen of usage, and in what a stream can print."""

    def error(self, message: str) -> NoReturn:
        problem = message.removeprefix("argument ")
        self.exit(USAGE, f"zmqcluster: {problem} (see {self.prog} --help)\n")

    def refuse_unknown(self, word: str) -> NoReturn:
        """A word no argument takes, with the nearest flag there is."""
        flags = [each for action in self._actions for each in action.option_strings]
        near = difflib.get_close_matches(word.partition("=")[0][:64], flags, n=1, cutoff=0.75)
        self.error(f"unknown argument {word}" + (f"; did you mean {near[0]}?" if near else ""))

    def _print_message(self, message: str, file: Any = None) -> None:
        stream = file or sys.stderr
        super()._print_message(encodable(message, stream) if stream else message, stream)


class _Formatter(argparse.RawDescriptionHelpFormatter):
    def add_argument(self, action: argparse.Action) -> None:
        super().add_argument(action)
        if isinstance(action, argparse._SubParsersAction):
            # argparse forgets that verbs stand two columns further in, and breaks the longest.
            self._action_max_length += 2


def _is_flag(word: str) -> bool:
    return word.startswith("-")


_Subparsers = argparse._SubParsersAction  # its only name


def _parser(
    program: str,
    help: str,
    example: str,
    *,
    into: _Subparsers[_Parser] | None = None,
    name: str = "",
) -> _Parser:
    if into is None:
        parser = _Parser(prog=program)
    else:
        parser = into.add_parser(name, prog=program, help=help)
    parser.description = help[:1].upper() + help[1:].rstrip(".") + "."
    parser.epilog = f"example:\n  {example}"
    parser.formatter_class = _Formatter
    # A flag of tomorrow must not change what a script of today means.
    parser.allow_abbrev = False
    parser.set_defaults(verb=None, parser=parser)
    return parser


def _subparsers(parser: _Parser) -> _Subparsers[_Parser]:
    return parser.add_subparsers(metavar="VERB", title="verbs")


def _add_verb(
    into: _Subparsers[_Parser],
    verb: Verb,
    program: str,
    example_prefix: str = "distribute ",
) -> None:
    parser = _parser(
        f"{program} {verb.name}",
        verb.help,
        f"python main.py {example_prefix}{verb.example}",
        into=into,
        name=verb.name,
    )
    if verb.arguments is not None:
        verb.arguments(parser)
    if verb.prints_data:
        parser.add_argument("--json", action="store_true", help="print JSON")
    _add_config(parser, verb.keys, talks=verb.talks)
    parser.set_defaults(verb=verb)


def _add_config(parser: argparse.ArgumentParser, names: Sequence[str], *, talks: bool) -> None:
    group = parser.add_argument_group("configuration")
    group.add_argument(
        "--config", metavar="FILE", help="JSON file with config keys (also ZMQCLUSTER_CONFIG)"
    )
    if talks:
        group.add_argument(
            "--api-token-file",
            metavar="FILE",
            help="token of the REST API, if not in data_dir (also ZMQCLUSTER_API_TOKEN)",
        )
    for name in names:
        _add_key(group, _KEYS[name])


def _add_key(group: argparse._ArgumentGroup, key: Key) -> None:
    many = isinstance(key.kind, ListOf)
    group.add_argument(
        key.flag,
        dest=KEY_PREFIX + key.name,
        action="append" if many else "store",
        metavar=_metavar(key),
        help=f"{key.help} {_default_text(key)}".replace("%", "%%").strip(),
    )


def _metavar(key: Key) -> str:
    if isinstance(key.kind, Choice):
        return "{" + ",".join(str(choice) for choice in key.kind.choices) + "}"
    return _METAVARS_BY_KEY.get(key.name) or _METAVARS.get(type(key.kind), "TEXT")


def _default_text(key: Key) -> str:
    value = key.default
    if value in ("", ()):
        return ""
    return f"({value:g})" if isinstance(value, float) else f"({value})"
