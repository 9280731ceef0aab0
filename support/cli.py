"""What every script shares with its user: flags, errors of one line, progress, files written whole or not at all.

Imports nothing heavy, so that a script can import it before torch: from then until `run_script`, Ctrl-C ends the
process without a traceback.
"""
import argparse
import dataclasses
import json
import os
import signal
import sys
import tempfile
import time
import types
import typing
from collections.abc import Callable
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
if Path(sys.argv[0]).resolve().is_relative_to(REPOSITORY):  # one of our scripts, not somebody's import
    signal.signal(signal.SIGINT, signal.SIG_DFL)


class UserError(ValueError):
    """Something the user can mend. The message says what was got, what was expected and what to do."""


def run_script(main: Callable, argv: list[str] | None = None) -> None:
    """Runs a script's main(argv): what the user can mend is one line on stderr and exit code 2.

    FARMER_DEBUG=1 shows the traceback instead.
    Models and torch raise plain ValueErrors for bad values, hence the wide net.
    """
    name = Path(sys.argv[0]).name
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        main(argv)
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:  # the reader of our output has left, as `| head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except (ValueError, OSError, MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "memory" not in str(error):
            raise
        if os.environ.get("FARMER_DEBUG"):
            raise
        print(f"{name}: error: {' '.join(str(error).split()) or type(error).__name__}", file=sys.stderr)
        sys.exit(2)


def warn(message: str) -> None:
    print(f"{Path(sys.argv[0]).name}: warning: {message}", file=sys.stderr, flush=True)


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its type where it has none; at most 200 characters."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0][:200]


# ------------------------------------------------------------------------------------------ flags
class Parser(argparse.ArgumentParser):
    """argparse with errors of one line, no abbreviated flags, and --some_flag read as --some-flag."""

    def __init__(self, **kwargs):
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False, **kwargs)

    def parse_known_args(self, args=None, namespace=None):
        return super().parse_known_args([dashed(a) for a in (sys.argv[1:] if args is None else args)], namespace)

    def error(self, message):
        print(f"{self.prog}: error: {message} (see --help)", file=sys.stderr)
        sys.exit(2)


def dashed(argument: str) -> str:
    """--noise_end=0.1 -> --noise-end=0.1; anything but a long flag stays as it is."""
    if not argument.startswith("--"):
        return argument
    flag, equals, value = argument.partition("=")
    return flag.replace("_", "-") + equals + value


def flag_of(field_name: str) -> str:
    """noise_end -> --noise-end."""
    return "--" + field_name.replace("_", "-")


def value_types(cls: type) -> dict[str, type]:
    """The type of each field's values: int for `int` and for `int | None`, also where annotations are strings."""
    found = {}
    for name, kind in typing.get_type_hints(cls).items():
        if isinstance(kind, types.UnionType):
            kind = next(t for t in typing.get_args(kind) if t is not types.NoneType)
        found[name] = kind
    return found


def add_fields(group, cls: type, defaults=None) -> None:
    """One flag for each field of a dataclass, with its help text, choices and default; one not given reads None.

    defaults: an instance whose values are shown instead of the class's. Fields that are dataclasses get no flag.
    Raises UserError where a field has the name of a flag that the parser has already.
    """
    kinds = value_types(cls)
    for f in dataclasses.fields(cls):
        kind = kinds[f.name]
        if dataclasses.is_dataclass(kind):
            continue
        default = f.default if defaults is None else getattr(defaults, f.name)
        text = f"{f.metadata.get('help', '')} (default: {'none' if default is None else default})".lstrip()
        options = dict(dest=f.name, default=None, help=text.replace("%", "%%"))
        if kind is bool:
            options |= dict(action=argparse.BooleanOptionalAction)
        elif f.metadata.get("choices"):
            options |= dict(choices=f.metadata["choices"])
        else:
            options |= dict(type=kind, metavar=kind.__name__.upper())
        try:
            group.add_argument(flag_of(f.name), **options)
        except argparse.ArgumentError:
            place = f"{cls.__module__}.{cls.__name__}"
            raise UserError(f"{place}: its field {f.name} has the name of a flag of this script; rename it") from None


def given(args: argparse.Namespace, cls: type) -> dict:
    """The fields of a dataclass that the command line sets."""
    values = {f.name: getattr(args, f.name, None) for f in dataclasses.fields(cls)}
    return {name: value for name, value in values.items() if value is not None}


def at_least(args: argparse.Namespace, **bounds: float) -> None:
    """Raises UserError for an argument that is below its bound (None, not given, passes)."""
    for name, least in bounds.items():
        value = getattr(args, name)
        if value is not None and not value >= least:
            raise UserError(f"{flag_of(name)}: got {value}, expected at least {least}")


def at_most(args: argparse.Namespace, **bounds: float) -> None:
    """Likewise for an argument that is above its bound."""
    for name, most in bounds.items():
        value = getattr(args, name)
        if value is not None and not value <= most:
            raise UserError(f"{flag_of(name)}: got {value}, expected at most {most}")


# ------------------------------------------------------------------------------------------ progress
class Progress:
    """One line on stderr, rewritten in a terminal, with the time left; nothing in the first two seconds."""

    def __init__(self, what: str, total: int, quiet: bool = False):
        self.what, self.total, self.quiet = what, total, quiet
        self.start, self.last = time.time(), 0.0

    def __call__(self, done: int) -> None:
        now, terminal = time.time(), sys.stderr.isatty()
        soon = now - self.last < (0.5 if terminal else 30) and done < self.total
        if self.quiet or soon or now - self.start < 2:
            return
        self.last = now
        left = duration((now - self.start) / max(done, 1) * (self.total - done))
        end = "\r" if terminal and done < self.total else "\n"
        print(f"{self.what} {done}/{self.total}, {left} left", end=end, file=sys.stderr, flush=True)


def duration(seconds: float) -> str:
    """3700 -> 1:01:40, 100 -> 1:40."""
    s = int(seconds)
    if s >= 3600:
        return f"{s // 3600}:{s // 60 % 60:02d}:{s % 60:02d}"
    return f"{s // 60}:{s % 60:02d}"


# ------------------------------------------------------------------------------------------ files
def expanded(path: str | Path) -> Path:
    """The path with ~ as the home directory; ~nobody stays as it is, where Path.expanduser raises."""
    return Path(os.path.expanduser(path))


def write_file(path: str | Path, write: Callable) -> None:
    """write(binary file object) into a temporary file that then takes the name `path`: never a half-written result.

    Raises UserError when that cannot be done; an older file of that name is then untouched.
    """
    path, temporary = expanded(path), None
    try:
        handle, temporary = tempfile.mkstemp(prefix=f"{path.name}.", suffix=".tmp", dir=path.parent)
        with os.fdopen(handle, "wb") as f:
            write(f)
            f.flush()
            os.fsync(f.fileno())
        os.chmod(temporary, 0o666 & ~current_umask())
        os.replace(temporary, path)
    except OSError as e:
        why = e.strerror or e
        raise UserError(f"{path}: cannot be written ({why}); free some space or choose another place") from e
    finally:
        if temporary and os.path.exists(temporary):
            os.remove(temporary)


def write_json(path: str | Path, value) -> None:
    write_file(path, lambda f: f.write(json.dumps(value).encode()))


def current_umask() -> int:
    """Python can read the umask only by setting it."""
    umask = os.umask(0)
    os.umask(umask)
    return umask


def check_writable(flag: str, path: str | Path) -> Path:
    """The path, ~ expanded, after a look that a file can be made there: before the work, not after it."""
    path = expanded(path)
    if path.is_dir():
        raise UserError(f"{flag}: got {path}, which is a directory; expected the name of a file")
    if not path.parent.is_dir():
        raise UserError(f"{flag}: {path.parent} is not a directory; create it first")
    try:
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as e:
        raise UserError(f"{flag}: {path} cannot be written ({e.strerror}); choose another place") from e
    return path


def cache_directory() -> Path:
    """Where downloads and listings are kept: $XDG_CACHE_HOME/farmer, else ~/.cache/farmer."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "farmer"


def check_memory(needed: float, what: str) -> None:
    """Raises UserError when `needed` bytes are more than this machine has."""
    if not hasattr(os, "sysconf") or "SC_PHYS_PAGES" not in os.sysconf_names:
        return  # Windows: unknown
    have = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if needed > have:
        needed = min(needed, 2**80)  # larger ones do not even fit a float
        raise UserError(f"{what} needs about {needed / 2**30:,.1f} GiB of memory and this machine has "
                        f"{have / 2**30:,.1f} GiB; choose smaller sizes")
