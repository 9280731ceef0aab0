"""Command-line helpers of the scripts: flags, one-line errors, progress, safe file writing."""
import argparse
import contextlib
import dataclasses
import os
import sys
import tempfile
import time
import types
import typing
from collections.abc import Callable, Iterator
from pathlib import Path


# ----------------------------------------------------------------------------- errors
class UserError(ValueError):
    """An error the user can fix. The message says what was got, what was expected, what to do."""


def run_script(main: Callable, argv: list[str] | None = None) -> None:
    """Runs a script's main(argv); an error the user can fix prints one line and exits with code 2.

    Models raise plain ValueErrors for bad settings, so those count too. Any other exception is a
    bug and keeps its traceback; FARMER_DEBUG=1 shows the traceback of every error.
    """
    try:
        main(argv)
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:  # the reader of our output has left, as `| head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except (ValueError, OSError) as error:
        if os.environ.get("FARMER_DEBUG"):
            raise
        message = " ".join(str(error).split()) or type(error).__name__
        if not isinstance(error, UserError):
            message += " (FARMER_DEBUG=1 shows where)"
        print(f"{Path(sys.argv[0]).name}: error: {message}", file=sys.stderr)
        sys.exit(2)


def warn(message: str) -> None:
    print(f"{Path(sys.argv[0]).name}: warning: {message}", file=sys.stderr, flush=True)


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its type where it has none."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0][:200]


@contextlib.contextmanager
def reading(path: str | Path, advice: str) -> Iterator[None]:
    """Context for reading a file that somebody else wrote: any error becomes one UserError.

    Its message holds `path`, the cause and `advice`.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        cause = f"{type(error).__name__}: {first_line(error)}"
        raise UserError(f"{path}: cannot be read ({cause}); {advice}") from error


# ----------------------------------------------------------------------------- flags
class Parser(argparse.ArgumentParser):
    """argparse with one-line errors, no abbreviated flags, and --some_flag = --some-flag."""

    def __init__(self, **kwargs):
        formatter = argparse.RawDescriptionHelpFormatter
        super().__init__(formatter_class=formatter, allow_abbrev=False, **kwargs)

    def parse_known_args(self, args=None, namespace=None):
        arguments = sys.argv[1:] if args is None else args
        return super().parse_known_args([dashed(a) for a in arguments], namespace)

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


def at_least(kind: type, least: float) -> Callable:
    """A `type` for argparse: a number of this kind that is not below `least`."""

    def convert(text: str):
        value = kind(text)
        if not value >= least:
            raise argparse.ArgumentTypeError(f"got {text}, expected at least {least}")
        return value

    convert.__name__ = kind.__name__  # argparse's error shows it if the text is not a number
    return convert


def value_types(cls: type) -> dict[str, type]:
    """The type of each field of a dataclass: int for `int` and for `int | None`."""
    found = {}
    for name, kind in typing.get_type_hints(cls).items():
        if isinstance(kind, types.UnionType):
            kind = next(t for t in typing.get_args(kind) if t is not types.NoneType)
        found[name] = kind
    return found


def add_fields(group, cls: type, defaults=None) -> None:
    """Adds a flag for each field of a dataclass, with the help text and choices in its metadata.

    A flag that is not given is None. The help shows the values of `defaults`, an instance. Fields
    that are dataclasses themselves get no flag. Raises UserError if a field has the name of a flag
    that the script already has.
    """
    kinds = value_types(cls)
    for field in dataclasses.fields(cls):
        kind = kinds[field.name]
        if dataclasses.is_dataclass(kind):
            continue
        text = field.metadata.get("help", "").replace("%", "%%")
        default = field.default if defaults is None else getattr(defaults, field.name)
        options = dict(dest=field.name, default=None, help=f"{text} (default: {default})")
        if kind is bool:
            options["action"] = argparse.BooleanOptionalAction
        else:
            options["type"] = kind
            options["choices"] = field.metadata.get("choices") or None
            options["metavar"] = None if options["choices"] else kind.__name__.upper()
        try:
            group.add_argument(flag_of(field.name), **options)
        except argparse.ArgumentError:
            raise UserError(f"{cls.__module__}.{cls.__name__}: its field {field.name} has the name "
                            "of a flag of this script; rename the field") from None


def given(args: argparse.Namespace, cls: type) -> dict:
    """The fields of a dataclass that the command line sets."""
    values = {field.name: getattr(args, field.name, None) for field in dataclasses.fields(cls)}
    return {name: value for name, value in values.items() if value is not None}


# ----------------------------------------------------------------------------- progress
class Progress:
    """Prints the time left on stderr, in a terminal on one line; silent for two seconds."""

    def __init__(self, what: str, total: int, quiet: bool = False):
        self.what = what
        self.total = total
        self.quiet = quiet
        self.start = time.time()
        self.last = 0.0

    def __call__(self, done: int) -> None:
        now = time.time()
        terminal = sys.stderr.isatty()
        pause = 0.5 if terminal else 30
        soon = now - self.last < pause and done < self.total
        if self.quiet or soon or now - self.start < 2:
            return
        self.last = now
        left = duration((now - self.start) / max(done, 1) * (self.total - done))
        end = "\r" if terminal and done < self.total else "\n"
        line = f"{self.what} {done}/{self.total}, {left} left"
        print(line, end=end, file=sys.stderr, flush=True)


def duration(seconds: float) -> str:
    """3700 -> 1:01:40, 100 -> 1:40."""
    s = int(seconds)
    if s >= 3600:
        return f"{s // 3600}:{s // 60 % 60:02d}:{s % 60:02d}"
    return f"{s // 60}:{s % 60:02d}"


# ----------------------------------------------------------------------------- files
def expanded(path: str | Path) -> Path:
    """The path with ~ as the home directory."""
    return Path(os.path.expanduser(path))


def write_file(path: str | Path, write: Callable) -> None:
    """Writes a file as a whole: write(file) fills a temporary file, which then becomes `path`.

    So there is never a half-written file. If it cannot be written, this raises UserError and an
    older file of that name stays untouched.
    """
    path = expanded(path)
    temporary = None
    try:
        handle, temporary = tempfile.mkstemp(prefix=f"{path.name}.", suffix=".tmp", dir=path.parent)
        with os.fdopen(handle, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        umask = os.umask(0)  # Python can read the umask only by setting it
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)
        os.replace(temporary, path)
    except OSError as error:
        cause = error.strerror or error
        raise UserError(f"{path}: cannot be written ({cause}); free some space or choose another "
                        "place") from error
    finally:
        if temporary and os.path.exists(temporary):
            os.remove(temporary)


def check_writable(flag: str, path: str | Path) -> Path:
    """Checks, before the work begins, that a file can be made there -> the path, ~ expanded."""
    path = expanded(path)
    if path.is_dir():
        raise UserError(f"{flag}: got {path}, which is a folder; expected the name of a file")
    if not path.parent.is_dir():
        raise UserError(f"{flag}: {path.parent} is not a folder; create it first")
    if not os.access(path.parent, os.W_OK):
        raise UserError(f"{flag}: {path.parent} cannot be written to; choose another place")
    return path


def cache_directory() -> Path:
    """The folder for downloads: $XDG_CACHE_HOME/farmer, else ~/.cache/farmer."""
    base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    if base.startswith("~"):
        raise UserError("there is no home folder to keep downloads in; set XDG_CACHE_HOME")
    return Path(base) / "farmer"
