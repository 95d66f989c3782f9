"""Options of a verb: declared once, spoken on the command line (`--max-steps` or `--max_steps`) and in YAML (`max_steps`).

Three sources, the later wins: defaults, the YAML file of `--config`, the command line. Both user sources pass through the same
aliases and the same conversion, so an option means and refuses the same wherever it is written.
"""

from __future__ import annotations

import argparse
import difflib
import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn


class UsageError(ValueError):
    """The command line or the YAML file says something that cannot be done."""


Convert = Callable[[Any], Any]


@dataclass(frozen=True, kw_only=True)
class Option:
    """One option. `name` is its key in YAML; `convert` takes text or a YAML value and raises ValueError.

    many: takes several values. nullable: "none" on the command line and null in YAML mean None. hidden: left out of `--help`
    until `--help-all`. required: None will not do. printed: whether `--print-config` shows it where nobody set it.
    """

    name: str
    help: str = ""
    convert: Convert = str
    metavar: str = "TEXT"
    default: Any = None
    group: str = "options"
    many: bool = False
    nullable: bool = False
    required: bool = False
    hidden: bool = False
    printed: bool = True

    @property
    def is_switch(self) -> bool:
        """`--fp16` alone means true; `--fp16 false` and `--no-fp16` say no."""
        return self.convert is switch

    def read(self, value: Any) -> Any:
        """The value in its type; UsageError that names the option where it has none."""
        try:
            alone = value[0] if isinstance(value, list) and len(value) == 1 else value
            if self.nullable and (alone is None or (isinstance(alone, str) and alone.lower() in ("none", "null"))):
                return None
            if self.many:
                return [self.convert(item) for item in (value if isinstance(value, list) else [value])]
            return self.convert(alone)
        except ValueError as error:
            raise UsageError(f"{flag(self.name)} {error}") from error


@dataclass(frozen=True)
class Alias:
    """Another spelling. `expand` turns its raw value into our options; without it, using the name is refused with `help`."""

    name: str
    help: str
    expand: Callable[[Any], dict[str, Any]] | None = None


@dataclass
class Given:
    """What a user asked for.

    values: option → value, defaults filled in. explicit: the names that the user wrote. config: the file they came from.
    note: for the head of a printed configuration.
    """

    values: dict[str, Any]
    explicit: set[str] = field(default_factory=set)
    config: str | None = None
    note: str = ""

    def __getitem__(self, name: str) -> Any:
        return self.values[name]

    def chosen(self, names: Iterable[str]) -> dict[str, Any]:
        """The explicit ones among `names`."""
        return {name: self.values[name] for name in names if name in self.explicit}


# Conversions.


def whole(value: Any) -> int:
    """A whole number, from text or YAML."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise ValueError(f"takes a whole number, not {value!r}")
    try:
        number_read = float(value)
    except ValueError:
        raise ValueError(f"takes a whole number, not {value!r}") from None
    if number_read != int(number_read):
        raise ValueError(f"takes a whole number, not {value!r}")
    return int(value) if not isinstance(value, str) or value.strip().lstrip("+-").isdigit() else int(number_read)


def number(value: Any) -> float:
    """A number; YAML 1.1 reads 1e-5 as text, so text is fine."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise ValueError(f"takes a number, not {value!r}")
    try:
        return float(value)
    except ValueError:
        raise ValueError(f"takes a number, not {value!r}") from None


def switch(value: Any) -> bool:
    """True or false."""
    if isinstance(value, bool):
        return value
    known = {"true": True, "yes": True, "on": True, "1": True, "false": False, "no": False, "off": False, "0": False}
    if str(value).lower() not in known:
        raise ValueError(f"takes true or false, not {value!r}")
    return known[str(value).lower()]


def text(value: Any) -> str:
    """Text; YAML reads a bare yes, no, on and off as a truth value, which must then stand in quotes."""
    if isinstance(value, bool):
        raise ValueError(f"takes text: write {'yes' if value else 'no'!r} in quotes, YAML reads it as {value}")
    if isinstance(value, dict | list) or value is None:
        raise ValueError(f"takes text, not {value!r}")
    return str(value)


def one_of(*choices: str) -> Convert:
    """One of a few words."""

    def convert(value: Any) -> str:
        # YAML's bare `no` is a word here if it is among the choices (`eval_strategy: no`).
        said = "no" if value is False and "no" in choices else str(value)
        if said not in choices:
            raise ValueError(f"takes one of {', '.join(choices)}, not {said!r}{nearest(said, choices)}")
        return said

    return convert


def mapping_or_text(value: Any) -> Any:
    """A mapping from YAML, JSON on the command line, or plain text."""
    if isinstance(value, str) and value.lstrip().startswith("{"):
        try:
            return json.loads(value)
        except json.JSONDecodeError as error:
            raise ValueError(f"is not valid JSON: {error}") from error
    return value


# Names.


def flag(name: str) -> str:
    """How an option is spelled on the command line."""
    return "--" + name.replace("_", "-")


def nearest(word: str, known: Iterable[str]) -> str:
    """The closest names as " (did you mean …?)", or nothing."""
    close = difflib.get_close_matches(word, list(known), n=3, cutoff=0.6)
    return f" (did you mean {' or '.join(close)}?)" if close else ""


def _hyphened(word: str) -> str:
    name, equals, value = word.partition("=")
    return name.replace("_", "-") + equals + value if word.startswith("--") else word


# Parsing.


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message} (see {self.prog} --help)")


_CONFIG = Option(
    name="config",
    help="a YAML file with these options (keys as here; `env:` exports variables). The command line wins",
    metavar="FILE",
)
_PRINT = Option(
    name="print_config", help="print all options as a YAML file that --config reads, and exit", convert=switch
)


@dataclass
class Command:
    """A verb's options with its help, and how they are read. `complete` fills in what follows from the given options."""

    prog: str
    description: str
    example: str
    options: Sequence[Option]
    aliases: Sequence[Alias] = ()
    epilog: str = ""
    complete: Callable[[Given], Given] = lambda given: given

    def __post_init__(self) -> None:
        self.by_name = {option.name: option for option in self.options}
        self.alias_names = {alias.name: alias for alias in self.aliases}

    @property
    def _universal(self) -> tuple[Option, Option]:
        return _CONFIG, _PRINT

    def read(self, argv: Sequence[str], file: tuple[dict[str, Any], str | None] | None = None) -> Given | None:
        """What the user asked for; None when `--help` or `--print-config` was answered instead."""
        if any(word in ("-h", "--help", "--help-all", "--help_all") for word in argv):
            print(self.help(everything=any(word.startswith("--help") and "all" in word for word in argv)), end="")
            return None
        spoken, unknown = self._parser(True).parse_known_args([_hyphened(word) for word in argv])
        self._refuse_unknown(unknown)
        raw = {name: value for name, value in vars(spoken).items() if name not in ("config", "print_config")}
        written, path = file if file is not None else read_yaml(vars(spoken).get("config"))
        given = self.complete(self._merge(written, raw, path))
        if switch(vars(spoken).get("print_config", False)):
            print(self.to_yaml(given), end="")
            return None
        self._check_required(given)
        return given

    def _merge(self, written: Mapping[str, Any], spoken: Mapping[str, Any], path: str | None) -> Given:
        values = {option.name: option.default for option in self.options}
        explicit: dict[str, Any] = {}
        for source, label in ((written, str(path)), (spoken, "")):
            raw = self._expand({key.replace("-", "_"): value for key, value in source.items()}, label)
            explicit |= {name: self.by_name[name].read(value) for name, value in raw.items()}
        return Given(values | explicit, set(explicit), path)

    def _expand(self, raw: dict[str, Any], label: str) -> dict[str, Any]:
        """Replaces aliases by our options; one option said twice in one source is an error."""
        where = f"{label}: " if label else ""
        ours: dict[str, Any] = {}
        said_by: dict[str, str] = {}
        for name, value in raw.items():
            alias = self.alias_names.get(name)
            if alias is None and name not in self.by_name:
                known = [*self.by_name, *self.alias_names]
                raise UsageError(f"{where}unknown key {name!r}{nearest(name, known)}; see {self.prog} --help")
            if alias is not None and alias.expand is None:
                raise UsageError(f"{where}{flag(name)} is refused: {alias.help}")
            try:
                expanded = alias.expand(value) if alias is not None and alias.expand is not None else {name: value}
            except ValueError as error:
                raise UsageError(f"{where}{flag(name)} {error}") from error
            for target, result in expanded.items():
                if target in ours and ours[target] != result:
                    raise UsageError(
                        f"{where}{flag(said_by[target])} and {flag(name)} both set {target}; give one of them"
                    )
                ours[target], said_by[target] = result, name
        return ours

    def _refuse_unknown(self, words: Sequence[str]) -> None:
        if not words:
            return
        word = words[0]
        if not word.startswith("--"):
            raise UsageError(f"unexpected {word!r}: options start with -- (see {self.prog} --help)")
        said = word.split("=")[0]
        known = [flag(name) for name in (*self.by_name, *self.alias_names)]
        raise UsageError(f"unknown option {said}{nearest(said, known)}; see {self.prog} --help")

    def _check_required(self, given: Given) -> None:
        for option in self.options:
            if option.required and given.values[option.name] is None:
                raise UsageError(f"{flag(option.name)} is missing: {option.help} (see {self.prog} --help)")

    # Help.

    def help(self, everything: bool = False) -> str:
        """The help text; `everything` also shows the rarely used options."""
        return self._parser(everything).format_help()

    def _closing(self) -> str:
        rest = "--help-all shows every option.\n" if any(option.hidden for option in self.options) else ""
        return rest + self.epilog

    def _parser(self, everything: bool) -> _Parser:
        parser = _Parser(
            prog=self.prog,
            usage=f"{self.prog} [options]\n\nexample: {self.example}",
            description=self.description,
            epilog=self._closing(),
            formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(prog, max_help_position=34, width=120),
            allow_abbrev=False,
            argument_default=argparse.SUPPRESS,
            add_help=False,
        )
        groups: dict[str, Any] = {}
        for option in (*self.options, *self._universal):
            if option.group not in groups:
                groups[option.group] = parser.add_argument_group(option.group)
            _add(groups[option.group], option, shown=everything or not option.hidden)
        for alias in self.aliases:
            parser.add_argument(flag(alias.name), dest=alias.name, nargs="*", action=_Raw, help=argparse.SUPPRESS)
        return parser

    # YAML.

    def to_yaml(self, given: Given) -> str:
        """Every option as YAML that `--config` reads back, group by group, without secrets."""
        import yaml

        lines = [f"# {self.prog} --config THIS_FILE" + (f"   ({given.note})" if given.note else "")]
        group = ""
        for option in self.options:
            if option.name == "hub_token" or not (option.printed or option.name in given.explicit):
                continue
            if option.group != group:
                group = option.group
                lines += ["", f"# {group}"]
            lines.append(
                yaml.safe_dump(
                    {option.name: given.values[option.name]}, sort_keys=False, allow_unicode=True, width=1000
                ).rstrip()
            )
        return "\n".join(lines) + "\n"


class _Raw(argparse.Action):
    """An alias's value as its expansion wants it: a word, a list of them, or true where none stands."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        setattr(namespace, self.dest, "true" if not values else values[0] if len(values) == 1 else values)


def _add(group: Any, option: Option, shown: bool) -> None:
    default = (
        "" if option.default in (None, [], False, "") or option.required else f" (default: {_shown(option.default)})"
    )
    explained = (option.help + default).replace("%", "%%") if shown else argparse.SUPPRESS
    name = flag(option.name)
    if option.is_switch:
        group.add_argument(name, dest=option.name, nargs="?", const="true", metavar="BOOL", help=explained)
        group.add_argument(
            flag("no_" + option.name), dest=option.name, action="store_const", const="false", help=argparse.SUPPRESS
        )
    elif option.many:
        group.add_argument(name, dest=option.name, nargs="+", action="extend", metavar=option.metavar, help=explained)
    else:
        group.add_argument(name, dest=option.name, metavar=option.metavar, help=explained)


def _shown(value: Any) -> str:
    return (
        " ".join(map(str, value))
        if isinstance(value, list)
        else f"{value:g}"
        if isinstance(value, float)
        else str(value)
    )


def config_path(argv: Sequence[str]) -> str | None:
    """The value of `--config`, before anything else is read."""
    parser = _Parser(add_help=False, allow_abbrev=False)
    parser.add_argument("--config")
    return parser.parse_known_args(list(argv))[0].config


def read_yaml(path: str | None) -> tuple[dict[str, Any], str | None]:
    """The mapping in a YAML file, its `env:` block exported; ({}, None) without a file. Keys written twice are refused."""
    if path is None:
        return {}, None
    import yaml

    class Loader(yaml.SafeLoader):
        def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
            keys = [self.construct_object(key, deep=True) for key, _ in node.value]
            twice = sorted({str(key) for key in keys if keys.count(key) > 1})
            if twice:
                raise UsageError(f"{path}: {twice[0]!r} is written twice")
            return super().construct_mapping(node, deep)

    try:
        content = yaml.load(Path(path).expanduser().read_text(encoding="utf-8"), Loader)  # noqa: S506
    except yaml.YAMLError as error:
        raise UsageError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
    content = {} if content is None else content
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise UsageError(f"{path}: write one `option: value` a line, as `--print-config` does")
    variables = content.pop("env", None) or {}
    if not isinstance(variables, dict) or any(isinstance(value, dict | list) for value in variables.values()):
        raise UsageError(f"{path}: env: takes `NAME: value` lines")
    for name, value in variables.items():
        os.environ[str(name)] = str(value)
    return content, path
